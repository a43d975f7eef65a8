"""The two passes of the derivative of a low rank, over queries and over keys."""

import math
from dataclasses import replace

import numpy as np

from fastattn._ops.lowrank import LEAST
from fastattn._ops.lowrank_gradient import key_vjp, query_vjp
from fastattn.gradients.backward import Backward
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.derivatives import Slopes
from fastattn.problem.head import Head
from fastattn.problem.rows import spread, take
from sketching._lib.arrays import (
    Array,
    array_namespace,
    compute_dtype,
    mover,
    to_host,
)


def query_slopes(
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
    slope : array, shape (n, d)
    sums : array, shape (r + c, p + 1)
        What the keys need to know of the rows, on the host.
    log_normalizer : array, shape (n,)
        Over all keys; infinite where the row is to be done exactly, and added nothing.
    drift : array, shape (n,)
        The product of the whole answer and ``grad``.
    """
    xp, basis = head.xp, structure.basis
    frame, move = basis.frame, mover(head.query, head.dtype)
    count = max(structure.count, 1)
    # sums of weights average one, so that they are in range
    unit = math.exp(-frame.offset) / count
    query = xp.astype(head.query, head.dtype, copy=False)
    middle = xp.matmul(grad, move(structure.middle))
    # values are summed less their middle
    slope, sums, normalizer, drift = query_vjp(
        query,
        grad,
        elsewhere,
        partial - middle,
        xp.matmul(query, move(mean)) + math.log(LEAST * count),
        move(frame.to_query),
        move(np.append(frame.origin[:-1], frame.origin[-1] - math.log(count))),
        move(basis.landmarks),
        move(frame.spread / frame.limit),
        move(structure.weights * unit),
        coarse=structure.coarse,
        **basis.hermite.recipe,
    )
    return slope, to_host(sums) * unit, normalizer, drift + middle


def key_slopes(
    key: Array, value: Array, far: Array, empty: LowRank, sums: Array
) -> tuple[Array, Array]:
    """Differentiate what rows, given by their sums, make of keys that are not far."""
    basis = empty.basis
    frame = basis.frame
    move = mover(key, compute_dtype(array_namespace(key), key.dtype))
    # the projection onto the basis is symmetric: it serves both sides
    found: tuple[Array, Array] = key_vjp(
        key,
        value,
        far,
        move(frame.center),
        move(frame.to_key),
        move(basis.landmarks),
        move(empty.middle),
        move(basis.project(sums)),
        offset=frame.offset,
        coarse=empty.coarse,
        **basis.hermite.recipe,
    )
    return found


def whole_slopes(
    head: Head, grad: Array, empty: LowRank, hard: Array
) -> tuple[Slopes, Backward]:
    """Differentiate a head, whose rows see all keys, over a basis.

    Rows that are ``hard``, boolean ``(n,)``, and rows out of reach add nothing, and
    have infinite normalizers in the second answer.
    """
    xp, m = head.xp, head.sizes[1]
    structure, far = empty.filled(head.key, head.value)
    keys = np.flatnonzero(to_host(far))
    alone = replace(head, key=take(head.key, keys), value=take(head.value, keys))
    answer, normalizer = alone.attend()
    query, sums, normalizer, drift = query_slopes(
        head,
        grad,
        structure,
        xp.where(hard, xp.inf, normalizer),
        xp.sum(grad * answer, axis=1),
        head.scale * structure.basis.frame.center,
    )
    state = Backward(head, grad, normalizer, drift)
    key, value = key_slopes(head.key, head.value, far, structure, sums)
    if not len(keys):
        return (query, key, value), state
    more = state.exact(None, keys)
    key, value = key + spread(more[1], keys, m), value + spread(more[2], keys, m)
    return (query + more[0], key, value), state
