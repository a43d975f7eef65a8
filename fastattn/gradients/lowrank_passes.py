"""The two passes of the low-rank gradients, over queries and over keys."""

import math
from dataclasses import replace

import numpy as np

from fastattn._ops.lowrank import LEAST
from fastattn._ops.lowrank_gradient import key_vjp, query_vjp
from fastattn.gradients.backward import Backward
from fastattn.methods.lowrank.structure import LowRank
from fastattn.problem.derivatives import Gradients
from fastattn.problem.head import Head, gather_rows
from fastattn.problem.rows import scatter_rows
from sketching._lib.arrays import Array, array_namespace, compute_dtype, mover, to_host


def query_pass(
    head: Head,
    grad: Array,
    structure: LowRank,
    elsewhere: Array,
    partial: Array,
    mean: Array,
) -> tuple[Array, Array, Array, Array]:
    """Low-rank gradients with respect to the queries, and sums over rows for the keys.

    Parameters
    ----------
    head, grad : Head, array of shape (n, p)
        The rows, and the gradient of the loss with respect to their outputs.
    structure : LowRank
        The key-value state of keys that all of the rows attend to; its far keys are
        left to the caller.
    elsewhere, partial : array, shape (n,)
        Log-sum-exp of the logits of all keys outside of the state, and the inner
        product of ``grad`` and the output over those keys alone.
    mean : array, shape (d,)
        A mean of the keys, times the scale. By Jensen's inequality the sum of weights
        is at least the number of keys times the weight of the mean; a row whose
        low-rank sum is below ``LEAST`` of that is computed exactly.

    Returns
    -------
    gradient : array, shape (n, d)
        With respect to the queries.
    sums : array, shape (r + c, p + 1)
        Sums over the rows, on the host: all that ``key_pass`` needs of them.
    log_normalizer : array, shape (n,)
        Over all keys; infinite for rows that must be computed exactly, which
        contribute zero.
    delta : array, shape (n,)
        The inner product of ``grad`` and the output over all keys.
    """
    xp, basis = head.xp, structure.basis
    whitening, move = basis.whitening, mover(head.query, head.dtype)
    count = max(structure.count, 1)
    # a unit in which weights average one, so that their sums are in range
    unit = math.exp(-whitening.offset) / count
    query = xp.astype(head.query, head.dtype, copy=False)
    grad_center = xp.matmul(grad, move(structure.value_center))
    # the state sums values less their center
    gradient, sums, normalizer, delta = query_vjp(
        query,
        grad,
        elsewhere,
        partial - grad_center,
        xp.matmul(query, move(mean)) + math.log(LEAST * count),
        basis.functions(move, whitening.origin[-1] - math.log(count)),
        move(structure.weights * unit),
        low_precision=structure.low_precision,
        **basis.hermite.op_arguments,
    )
    return gradient, to_host(sums) * unit, normalizer, delta + grad_center


def key_pass(
    key: Array, value: Array, far: Array, empty: LowRank, sums: Array
) -> tuple[Array, Array]:
    """Low-rank gradients with respect to keys and values, from sums over the rows.

    Far keys get zeros.
    """
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
    """Low-rank gradients of a head whose rows attend to all keys.

    Outlier rows, ``outlier_mask`` of shape ``(n,)``, and rows whose softmax denominator
    is too small for the low rank contribute zero, and have infinite log-sum-exps in the
    second result.
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
