"""The two passes of the derivative of a low rank, over queries and over keys."""

import math
from dataclasses import replace

import numpy as np

from fastattn._ops.lowrank import LEAST
from fastattn._ops.lowrank_gradient import key_vjp, query_vjp
from fastattn.gradients.backward import Backward
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head
from fastattn.problem.rows import gather_rows, scatter_rows
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    mover,
    to_host,
)


def query_pass(
    head: Head,
    grad: Array,
    structure: LowRank,
    elsewhere: Array,
    partial: Array,
    mean: Array,
) -> tuple[Array, Array, Array, Array]:
    """Differentiate what a structure answers, by the queries of a head.

    Parameters
    ----------
    head, grad : Head, array of shape (n, p)
        The rows, and the derivative by their answers.
    structure : LowRank
        The keys that all of the rows see; but far ones are not seen to here.
    elsewhere, partial : array, shape (n,)
        The log-sum-exp of the logits of other keys; and the product of the answer over
        those alone and ``grad``.
    mean : array, shape (d,)
        A mean of the keys, in units of the scale: weights below its weight are false.

    Returns
    -------
    gradient : array, shape (n, d)
    sums : array, shape (r + c, p + 1)
        What the keys need to know of the rows, on the host.
    log_normalizer : array, shape (n,)
        Over all keys; infinite where the row is to be done exactly, and added nothing.
    delta : array, shape (n,)
        The product of the whole answer and ``grad``.
    """
    xp, basis = head.xp, structure.basis
    whitening, move = basis.whitening, mover(head.query, head.dtype)
    count = max(structure.count, 1)
    # sums of weights average one, so that they are in range
    unit = math.exp(-whitening.offset) / count
    query = xp.astype(head.query, head.dtype, copy=False)
    grad_center = xp.matmul(grad, move(structure.value_center))
    # values are summed less their middle
    gradient, sums, normalizer, delta = query_vjp(
        query,
        grad,
        elsewhere,
        partial - grad_center,
        xp.matmul(query, move(mean)) + math.log(LEAST * count),
        move(whitening.to_query),
        move(np.append(whitening.origin[:-1], whitening.origin[-1] - math.log(count))),
        move(basis.landmarks),
        move(whitening.spread / whitening.limit),
        move(structure.weights * unit),
        low_precision=structure.low_precision,
        **basis.hermite.op_arguments,
    )
    return gradient, to_host(sums) * unit, normalizer, delta + grad_center


def key_pass(
    key: Array, value: Array, far: Array, empty: LowRank, sums: Array
) -> tuple[Array, Array]:
    """Differentiate what rows, given by their sums, make of keys that are not far."""
    basis = empty.basis
    whitening = basis.whitening
    move = mover(key, compute_dtype(array_namespace(key), key.dtype))
    # the projection onto the basis is symmetric: it serves both sides
    found: tuple[Array, Array] = key_vjp(
        key,
        value,
        far,
        move(whitening.center),
        move(whitening.to_key),
        move(basis.landmarks),
        move(empty.value_center),
        move(basis.project(sums)),
        offset=whitening.offset,
        low_precision=empty.low_precision,
        **basis.hermite.op_arguments,
    )
    return found


def whole_vjp(
    head: Head, grad: Array, empty: LowRank, outlier_mask: Array
) -> tuple[Gradients, Backward]:
    """Differentiate a head, whose rows see all keys, over a basis.

    Rows that are ``outlier_mask``, boolean ``(n,)``, and rows out of reach add nothing,
    and have infinite normalizers in the second answer.
    """
    xp, m = head.xp, head.sizes[1]
    structure, far = empty.filled(head.key, head.value)
    keys = np.flatnonzero(to_host(far))
    alone = replace(
        head, key=gather_rows(head.key, keys), value=gather_rows(head.value, keys)
    )
    answer, normalizer = alone.attend()
    query, sums, normalizer, delta = query_pass(
        head,
        grad,
        structure,
        xp.where(outlier_mask, xp.inf, normalizer),
        xp.sum(grad * answer, axis=1),
        head.scale * structure.basis.whitening.center,
    )
    state = Backward(head, grad, normalizer, delta)
    key, value = key_pass(head.key, head.value, far, structure, sums)
    if not len(keys):
        return (query, key, value), state
    more = state.exact(None, keys)
    key, value = (
        key + scatter_rows(more[1], keys, m),
        value + scatter_rows(more[2], keys, m),
    )
    return (query + more[0], key, value), state
