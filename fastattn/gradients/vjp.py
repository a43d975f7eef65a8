"""Derivatives of softmax attention: what reverse-mode differentiation needs.

Exact ones are computed in blocks, with nothing of size n x m. Where attention is
near-linear, by a low rank or by near keys and clusters, its derivative is too.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fastattn._attention import attention, check_options
from fastattn.gradients.backward import SLACK, Slopes, spread
from fastattn.gradients.exact import coarse_slopes, exact_slopes
from fastattn.gradients.lowrank import (
    least_share,
    lowrank_slopes,
    slopes_if_they_pay,
    worth_a_try,
)
from fastattn.gradients.multipole import (
    QUICK,
    clusters_if_they_pay,
    multipole_slopes,
)
from fastattn.methods.exact import Exact
from fastattn.methods.multipole.method import Multipole
from fastattn.methods.polynomial.method import Polynomial
from fastattn.planning.auto import Auto
from fastattn.problem.batch import Batch, own_place, pick
from fastattn.problem.head import Head, Method
from sketching._lib.arrays import Array, array_namespace, plain, to_host
from sketching._lib.certificate import RefusalError
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import (
    check_finite,
    check_float_array,
)


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
    :math:`dK = s\,dS^\top Q`, where :math:`dS = P \circ (G V^\top - r 1^\top)` and
    :math:`r` are the row sums of :math:`P \circ G V^\top`. The answers are what
    reverse-mode differentiation hands on: a vector-Jacobian product.

    Parameters
    ----------
    query, key, value : array, shapes (..., n, d), (..., m, d), (..., m, p)
        As in :func:`attention`.
    grad_output : array, shape (..., n, p)
        Derivative of a loss by the output of :func:`attention`, of its shape and
        dtype.
    tol : float, default 1e-2
        A low rank, clusters, or products of rounded numbers, are kept only where each
        of the three derivatives errs, on rows sampled after the fact, by at most ``3 *
        tol`` in relative Frobenius norm.
    scale, is_causal, key_mask
        As in :func:`attention`.
    method : AttentionMethod, optional
        ``Auto()`` by default: clusters or a low rank where they are predicted to pay
        and pass the check, else all logits: in bfloat16 where the processor and the
        check allow, or as ``Exact()``. The other choices are ``Multipole()`` and
        ``Polynomial(basis="hermite")``.
    guarantee : {"sampled", "proven"}
        With ``"proven"`` derivatives are exact up to rounding.
    rng : int or Generator, optional
        Source of the samples; an int makes the call reproducible.

    Returns
    -------
    tuple of array
        Derivatives by ``query``, ``key`` and ``value``, each of the shape and dtype of
        its argument: summed over dimensions that were broadcast. A row that sees no
        key, and a key that no row sees, have zeros.

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
    The check differentiates sampled queries from their own exact weights. Sampled
    keys, more often those of large derivatives, take the normalizers and drifts of all
    queries as the low rank or the clusters have them, whose errors are mostly second
    to those of the weights. It is an estimate, not a certificate.

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
    batch = Batch.of(query, key, value, scale, is_causal, key_mask)
    grad_output = check_grad(batch, grad_output)
    tol, method, generator = check_options(tol, method, guarantee, rng)
    _check_method(method, guarantee)
    children = generator.spawn(batch.count)
    total: list[dict[tuple[int, ...], Array]] = [{}, {}, {}]
    inputs = batch.query, batch.key, batch.value
    for place, head, child in zip(
        np.ndindex(*batch.lead), batch.heads(), children, strict=True
    ):
        grad = head.xp.astype(grad_output[(*place, ...)], head.dtype, copy=False)
        seen = head.trimmed()
        slopes = _slopes(seen, grad, tol, method, guarantee, child)
        slopes = unmasked(batch, place, _untrimmed(head, seen, slopes))
        for sums, x, slope in zip(total, inputs, slopes, strict=True):
            own = own_place(x, place)
            sums[own] = sums[own] + slope if own in sums else slope
    names = "query", "key", "value"
    first, second, third = (
        assembled(*each) for each in zip(names, inputs, total, strict=True)
    )
    return first, second, third


def loss_gradient(
    a1: Array,
    a2: Array,
    a3: Array,
    x: Array,
    y: Array,
    target: Array,
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    method: Method | None = None,
    rng: RandomSource = None,
) -> Array:
    r"""Differentiate the training loss of one attention layer by its query-key matrix.

    The loss is :math:`L(X) = \frac12 \| D^{-1} \exp(s\,A_1 X A_2^\top) A_3 Y - E
    \|_F^2`, where :math:`D` makes rows sum to one. With :math:`f` the softmax matrix,
    :math:`q = (f A_3 Y - E)(A_3 Y)^\top` and :math:`r_i = \langle f_i, q_i\rangle`,
    :math:`dL/dX = s\,A_1^\top (f \circ q - \mathrm{diag}(r) f) A_2`. It is near-linear
    wherever :func:`attention` and :func:`attention_vjp` are.

    Parameters
    ----------
    a1, a2, a3 : array, shapes (..., n, d), (..., m, e), (..., m, c)
        What queries, keys and values are made from.
    x : array, shape (..., d, e)
        Product of the query and key matrices.
    y : array, shape (..., c, p)
        The value matrix.
    target : array, shape (..., n, p)
        The output that is wanted, :math:`E`.
    tol : float, default 1e-2
        As in :func:`attention` and :func:`attention_vjp`.
    scale : float, optional
        The factor :math:`s`, by default ``e ** -0.5``; the paper has ``1 / d``.
    method : AttentionMethod, optional
        As in :func:`attention_vjp`.
    rng : int or Generator, optional
        Source of the samples.

    Returns
    -------
    array, shape (..., d, e)
        The derivative of the loss by ``x``.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import loss_gradient
    >>> rng = np.random.default_rng(0)
    >>> a1, a2, a3, target = rng.standard_normal((4, 20, 3))
    >>> x, y = rng.standard_normal((2, 3, 3))
    >>> loss_gradient(a1, a2, a3, x, y, target).shape
    (3, 3)

    References
    ----------
    Alman and Song, The Fine-Grained Complexity of Gradient Computation for Training
    Large Language Models, arXiv 2402.04497.
    """
    names = {"a1": a1, "a2": a2, "a3": a3, "x": x, "y": y, "target": target}
    xp = array_namespace(*names.values())
    for name, array in names.items():
        check_float_array(name, array, least_ndim=2)
    for left, right in (("a1", "x"), ("a3", "y")):
        if names[left].shape[-1] != names[right].shape[-2]:
            raise ValueError(
                f"{left} has {names[left].shape[-1]} columns and {right} has "
                f"{names[right].shape[-2]} rows"
            )
    query, value = xp.matmul(a1, x), xp.matmul(a3, y)
    forward, backward = as_generator(rng).spawn(2)
    options: dict[str, Any] = {"tol": tol, "scale": scale, "method": method}
    output = attention(query, a2, value, rng=forward, **options)
    if target.shape != output.shape:
        raise ValueError(
            f"target: expected shape {output.shape}, as the output, got {target.shape}"
        )
    slope, _, _ = attention_vjp(
        query, a2, value, output - target, rng=backward, **options
    )
    return xp.matmul(xp.matrix_transpose(a1), slope)


def check_grad(batch: Batch, grad: Array) -> Array:
    """Return ``grad_output`` checked against what it is the derivative by."""
    try:
        array_namespace(batch.query, grad)
    except TypeError as error:
        raise TypeError(f"grad_output: {error}") from error
    grad = plain(grad)
    if grad.dtype != batch.query.dtype:
        raise TypeError(
            f"grad_output: expected {batch.query.dtype}, as the query, got {grad.dtype}"
        )
    wanted = (*batch.lead, batch.query.shape[-2], batch.value.shape[-1])
    if tuple(grad.shape) != wanted:
        raise ValueError(
            f"grad_output: expected shape {wanted}, as the output of attention, got "
            f"{tuple(grad.shape)}"
        )
    check_finite("grad_output", grad)
    return grad


def _check_method(method: Any, guarantee: str) -> None:
    """Raise unless the method has a derivative, under this guarantee."""
    if isinstance(method, Auto | Exact):
        return
    if not isinstance(method, Polynomial | Multipole):
        raise RefusalError(
            f"{method} has no derivative: use Auto(), or linear_attention_vjp()"
        )
    if (
        isinstance(method, Polynomial)
        and method.basis != "hermite"
        and not method.landmarks
    ):
        raise RefusalError(
            f"Polynomial(basis={method.basis!r}) has no derivative: use 'hermite', "
            "Auto() or Exact()"
        )
    if guarantee == "proven":
        raise RefusalError(f"derivatives of {method} are not proven: use Exact()")


def _slopes(
    head: Head,
    grad: Array,
    tol: float,
    method: Method,
    guarantee: str,
    rng: np.random.Generator,
) -> Slopes:
    """Differentiate one head by the method, by a low rank that pays, or exactly."""
    if isinstance(method, Polynomial | Multipole) and head.sizes[1]:
        return _asked_for(head, grad, tol, method, rng)
    if isinstance(method, Auto) and guarantee == "sampled" and head.logits:
        found = _near_linear(head, grad, tol, rng)
        found = coarse_slopes(head, grad, tol, rng) if found is None else found
        if found is not None:
            return found
    return exact_slopes(head, grad)


def _asked_for(
    head: Head,
    grad: Array,
    tol: float,
    method: Polynomial | Multipole,
    rng: np.random.Generator,
) -> Slopes:
    """Differentiate by the given method, or refuse."""
    if isinstance(method, Multipole):
        if head.visible is not None:
            raise RefusalError(
                "derivatives of Multipole() do not take is_causal=True: use "
                "Polynomial(basis='hermite'), Exact() or Auto()"
            )
        slopes, error = multipole_slopes(head, grad, tol, rng, method=method)
        more = "lower threshold"
    else:
        empty = method.structure(head, rng)
        slopes, error = lowrank_slopes(head, grad, empty, rng, SLACK * tol)
        method = replace(method, rank=empty.rank, landmarks=empty.landmarks)
        more = "rank"
    if not error <= SLACK * tol:
        raise RefusalError(
            f"derivatives of {method} miss 3 * tol with tol={tol:g}: {error:.2e} "
            f"on sampled rows; raise tol or {more}, or use Auto()"
        )
    return slopes


def _near_linear(
    head: Head, grad: Array, tol: float, rng: np.random.Generator
) -> Slopes | None:
    """Differentiate by clusters or a low rank, if one pays and meets ``3 * tol``."""
    lowranks = worth_a_try(head, grad, tol, rng)
    share = least_share(head, tol, lowranks)
    if share > QUICK:
        found = clusters_if_they_pay(head, grad, tol, rng, share)
        if found is not None:
            return found
    found = slopes_if_they_pay(head, grad, tol, rng, lowranks)
    if found is None and share <= QUICK:
        found = clusters_if_they_pay(head, grad, tol, rng, 1.0)
    return found


def _untrimmed(head: Head, seen: Head, slopes: Slopes) -> Slopes:
    """Give the last keys, which no row sees, derivatives of zero."""
    m, some = head.sizes[1], np.arange(seen.sizes[1])
    if len(some) == m:
        return slopes
    return slopes[0], spread(slopes[1], some, m), spread(slopes[2], some, m)


def unmasked(batch: Batch, place: tuple[int, ...], slopes: Slopes) -> Slopes:
    """Give masked keys, which the head was not told of, derivatives of zero."""
    if batch.key_mask is None:
        return slopes
    m = batch.key.shape[-2]
    kept = np.flatnonzero(to_host(pick(batch.key_mask, place, 1)))
    return slopes[0], spread(slopes[1], kept, m), spread(slopes[2], kept, m)


def assembled(name: str, x: Array, sums: dict[tuple[int, ...], Array]) -> Array:
    """Put the derivatives of heads into the shape and dtype of an argument."""
    xp = array_namespace(x)
    parts = [sums[place] for place in np.ndindex(*x.shape[:-2])]
    whole = parts[0] if len(parts) == 1 else xp.stack(parts)
    with np.errstate(over="ignore"):
        whole = xp.astype(xp.reshape(whole, x.shape), x.dtype, copy=False)
    if not bool(xp.all(xp.isfinite(whole))):
        raise RefusalError(
            f"the derivative by {name} overflows {x.dtype}: scale grad_output down or "
            "pass arrays of a wider dtype"
        )
    return whole
