"""Gradients of softmax attention: the vector-Jacobian product.

Exact gradients are computed in blocks, without an array of size n x m. Where low-rank
or multipole attention takes near-linear time, so do its gradients.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import Any, TypeAlias

import numpy as np

from fastattn.costs.policy import POLICY
from fastattn.gradients.backward import SLACK
from fastattn.gradients.exact import exact_vjp, low_precision_vjp
from fastattn.gradients.lowrank import (
    least_share,
    lowrank_vjp,
    lowrank_vjp_if_faster,
    worth_a_try,
)
from fastattn.gradients.multipole import cluster_vjp, cluster_vjp_if_faster
from fastattn.methods.exact import Exact
from fastattn.methods.multipole.method import Multipole
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.planning.options import check_options
from fastattn.problem.batch import Batch, named_head, own_place
from fastattn.problem.derivatives import Gradients, assembled, check_grad, unmasked
from fastattn.problem.head import Head
from fastattn.problem.plan import Method
from fastattn.problem.rows import scatter_rows
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.random import RandomSource

# gradients of one head, given that of its output, a tolerance and a random generator
Differentiate: TypeAlias = Callable[
    [Head, Array, float, np.random.Generator], Gradients
]


def attention_vjp(
    query: Array,
    key: Array,
    value: Array,
    grad_output: Array,
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    method: Method | None = None,
    guarantee: str = "sampled",
    rng: RandomSource = None,
) -> tuple[Array, Array, Array]:
    r"""Differentiate ``sum(grad_output * attention(query, key, value))``.

    With the softmax weights :math:`P`, :math:`G` = ``grad_output`` and :math:`\circ`
    the entrywise product, :math:`dV = P^\top G`, :math:`dQ = s\,dS\,K` and
    :math:`dK = s\,dS^\top Q`, where :math:`dS = P \circ (G V^\top - \delta 1^\top)` and
    :math:`\delta` are the row sums of :math:`P \circ G V^\top`. The results are what
    reverse-mode differentiation needs: a vector-Jacobian product.

    Parameters
    ----------
    query, key, value : array, shapes (..., n, d), (..., m, d), (..., m, p)
        As in :func:`attention`.
    grad_output : array, shape (..., n, p)
        Gradient of a loss with respect to the output of :func:`attention`, of its
        shape and dtype.
    tol : float, default 1e-2
        Low-rank, cluster-based or bfloat16 gradients are returned only if the relative
        Frobenius error of each of the three, estimated on sampled rows, is at most
        ``3 * tol``.
    scale, is_causal, key_mask
        As in :func:`attention`.
    method : AttentionMethod, optional
        ``Auto()`` by default: clusters or a low rank where they are predicted to be
        faster and pass the check, else all logits: in bfloat16 where the processor and
        the check allow, or as ``Exact()``. The other choices are ``Multipole()`` and
        ``Polynomial(basis="hermite")``.
    guarantee : {"sampled", "proven"}
        With ``"proven"`` gradients are exact up to rounding.
    rng : int or Generator, optional
        Source of the samples; an int makes the call reproducible.

    Returns
    -------
    tuple of array
        Gradients with respect to ``query``, ``key`` and ``value``, each of the shape
        and dtype of its argument: summed over dimensions that were broadcast. A row
        that attends to no key, and a key that no row attends to, have zeros.

    Raises
    ------
    TypeError
        If the inputs are no arrays of one library and one floating-point dtype.
    ValueError
        If shapes do not match, an array is empty or not finite, or an option is out
        of range.
    RefusalError
        If the given method misses ``3 * tol``, has no derivative, or numbers overflow.

    Notes
    -----
    The check computes gradients of sampled queries from their exact weights. Those of
    sampled keys, drawn by the size of their gradients, use log-sum-exps and deltas of
    all queries from the approximation, whose errors are mostly smaller than those of
    the weights. It is an estimate, not a certificate.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import attention, attention_vjp
    >>> rng = np.random.default_rng(0)
    >>> query, key, value, grad_output = rng.standard_normal((4, 5, 3))
    >>> d_query, d_key, d_value = attention_vjp(query, key, value, grad_output)
    >>> step = np.zeros((5, 3))
    >>> step[2, 1] = 1e-6
    >>> more, less = (attention(query + x, key, value) for x in (step, -step))
    >>> bool(abs(np.sum(grad_output * (more - less)) / 2e-6 - d_query[2, 1]) < 1e-6)
    True

    References
    ----------
    Alman and Song, The Fine-Grained Complexity of Gradient Computation for Training
    Large Language Models, arXiv 2402.04497.
    Dao et al., FlashAttention, arXiv 2205.14135.
    """
    tol, method, generator = check_options(tol, method, guarantee, rng)
    differentiate = derivative_of(method, guarantee)
    batch = Batch.of(query, key, value, scale, is_causal, key_mask)
    grad_output = check_grad(batch, grad_output)
    children = generator.spawn(batch.count)
    total: list[dict[tuple[int, ...], Array]] = [{}, {}, {}]
    inputs = batch.query, batch.key, batch.value
    for place, head, child in zip(
        np.ndindex(*batch.lead), batch.heads(), children, strict=True
    ):
        grad = head.xp.astype(grad_output[(*place, ...)], head.dtype, copy=False)
        seen = head.trimmed()
        with named_head(place):
            gradients = differentiate(seen, grad, tol, child)
        gradients = unmasked(batch, place, _untrimmed(head, seen, gradients))
        for sums, x, gradient in zip(total, inputs, gradients, strict=True):
            own = own_place(x, place)
            sums[own] = sums[own] + gradient if own in sums else gradient
    names = "query", "key", "value"
    first, second, third = (
        assembled(*each) for each in zip(names, inputs, total, strict=True)
    )
    return first, second, third


@singledispatch
def derivative_of(method: Any, _guarantee: str) -> Differentiate:
    """The gradients of a head by a method; raise ``RefusalError`` if it has none.

    A method is registered with a function of the method and the guarantee.
    """
    raise RefusalError(
        f"{method} has no derivative: use Auto(), or linear_attention_vjp()"
    )


@derivative_of.register
def _of_exact(_method: Exact, _guarantee: str) -> Differentiate:
    return _exactly


@derivative_of.register
def _of_auto(_method: Auto, guarantee: str) -> Differentiate:
    return _exactly if guarantee == "proven" else _fastest


@derivative_of.register
def _of_polynomial(method: Polynomial, guarantee: str) -> Differentiate:
    if not method.fits_a_basis:
        raise RefusalError(
            f"Polynomial(basis={method.basis!r}) has no derivative: use 'hermite', "
            "Auto() or Exact()"
        )
    _check_sampled(method, guarantee)

    def differentiate(
        head: Head, grad: Array, tol: float, rng: np.random.Generator
    ) -> Gradients:
        if not head.sizes[1]:
            return exact_vjp(head, grad)
        empty = method.structure(head, rng)
        gradients, error = lowrank_vjp(head, grad, empty, rng, SLACK * tol)
        made = replace(method, rank=empty.rank, landmarks=empty.landmarks)
        _check_error(made, error, tol, "rank")
        return gradients

    return differentiate


@derivative_of.register
def _of_multipole(method: Multipole, guarantee: str) -> Differentiate:
    _check_sampled(method, guarantee)

    def differentiate(
        head: Head, grad: Array, tol: float, rng: np.random.Generator
    ) -> Gradients:
        if not head.sizes[1]:
            return exact_vjp(head, grad)
        if head.prefix_lengths is not None:
            raise RefusalError(
                "derivatives of Multipole() do not take is_causal=True: use "
                "Polynomial(basis='hermite'), Exact() or Auto()"
            )
        gradients, error = cluster_vjp(head, grad, tol, rng, method=method)
        _check_error(method, error, tol, "lower threshold")
        return gradients

    return differentiate


def _check_sampled(method: Any, guarantee: str) -> None:
    """Raise ``RefusalError`` where proven gradients are wanted."""
    if guarantee == "proven":
        raise RefusalError(f"derivatives of {method} are not proven: use Exact()")


def _check_error(method: Any, error: float, tol: float, advice: str) -> None:
    """Raise ``RefusalError`` if gradients miss the tolerance."""
    if not error <= SLACK * tol:
        raise RefusalError(
            f"derivatives of {method} miss 3 * tol with tol={tol:g}: {error:.2e} "
            f"on sampled rows; raise tol or {advice}, or use Auto()"
        )


def _exactly(
    head: Head, grad: Array, _tol: float, _rng: np.random.Generator
) -> Gradients:
    return exact_vjp(head, grad)


def _fastest(
    head: Head, grad: Array, tol: float, rng: np.random.Generator
) -> Gradients:
    """Gradients by the method that is predicted to be the fastest."""
    if not head.logits:
        return exact_vjp(head, grad)
    found = _near_linear(head, grad, tol, rng)
    found = low_precision_vjp(head, grad, tol, rng) if found is None else found
    return exact_vjp(head, grad) if found is None else found


def _near_linear(
    head: Head, grad: Array, tol: float, rng: np.random.Generator
) -> Gradients | None:
    """Cluster or low-rank gradients if faster and within ``3 * tol``, else None."""
    lowranks = worth_a_try(head, grad, tol, rng)
    share = least_share(head, tol, lowranks)
    if share > POLICY.multipole.quick_share:
        found = cluster_vjp_if_faster(head, grad, tol, rng, share)
        if found is not None:
            return found
    found = lowrank_vjp_if_faster(head, grad, tol, rng, lowranks)
    if found is None and share <= POLICY.multipole.quick_share:
        found = cluster_vjp_if_faster(head, grad, tol, rng, 1.0)
    return found


def _untrimmed(head: Head, seen: Head, gradients: Gradients) -> Gradients:
    """Give the last keys, which no row attends to, zero gradients."""
    m, some = head.sizes[1], np.arange(seen.sizes[1])
    if len(some) == m:
        return gradients
    return (
        gradients[0],
        scatter_rows(gradients[1], some, m),
        scatter_rows(gradients[2], some, m),
    )
