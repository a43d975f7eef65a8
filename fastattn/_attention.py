"""The public calls: validate, choose, run, assemble."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fastattn.methods.exact import Exact, may_overflow
from fastattn.planning.auto import Auto
from fastattn.planning.explanation import Explanation, run_candidates
from fastattn.planning.options import check_options
from fastattn.problem.batch import Batch
from fastattn.problem.head import Head
from fastattn.problem.plan import Candidate, HeadAnswer, Method
from sketching._lib.arrays import Array
from sketching._lib.certificate import Approximation
from sketching._lib.random import RandomSource
from sketching._lib.threads import parallel_map

_T = TypeVar("_T")


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    method: Method | None = None,
    guarantee: str = "sampled",
    rng: RandomSource = None,
) -> Array:
    r"""Softmax attention to a tolerance.

    Computes :math:`D^{-1} \exp(s\,Q K^\top) V` for each head, where :math:`D` makes
    the rows of the exponential sum to one, by the cheapest method whose error is at
    most ``tol``. Use :func:`approximate` to see the certificate.

    Parameters
    ----------
    query : array, shape (..., n, d)
        Queries :math:`Q`; leading dimensions are batch and heads.
    key : array, shape (..., m, d)
        Keys :math:`K`; leading dimensions broadcast against those of ``query``.
    value : array, shape (..., m, p)
        Values :math:`V`, one for each key.
    tol : float, default 1e-2
        With ``guarantee="sampled"`` the relative error of a head,
        ``||out - exact||_F / ||exact||_F``. With ``"proven"`` the largest absolute
        error, in units of half the range of the values of the head.
    scale : float, optional
        The factor :math:`s`. By default ``d ** -0.5``.
    is_causal : bool, default False
        Query ``i`` attends to keys ``j <= i`` only, as in scaled_dot_product_attention.
    key_mask : boolean array, shape (..., m), optional
        True for keys that take part. A row that attends to no key gets zeros. Leading
        dimensions align with those of the heads from the right; an axis of queries of
        length 1, ``(..., 1, m)``, is accepted as in ``scaled_dot_product_attention``. A
        mask for each sequence, (batch, m), is passed as ``mask[:, None]``.
    method : AttentionMethod, optional
        ``Auto()`` by default. A method that cannot meet ``tol`` is refused.
    guarantee : {"sampled", "proven"}
        What the certificate rests on: a sample of rows that are computed exactly after
        the output, or a worst-case bound for all rows from bounds on the inputs.
    rng : int or Generator, optional
        Source of the samples; an int makes the call reproducible.

    Returns
    -------
    array, shape (..., n, p)
        Of the library and dtype of the inputs. float16 and bfloat16 are computed in
        float32.

    Raises
    ------
    TypeError
        If the inputs are no arrays of one library and one floating-point dtype.
    ValueError
        If shapes do not match, an array is empty or not finite, or an option is out
        of range.
    RefusalError
        If the given method cannot meet ``tol``; the message has the numbers.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 4, 100, 16)) * 0.3
    >>> fastattn.attention(query, key, value, tol=1e-2, rng=0).shape
    (4, 100, 16)

    References
    ----------
    Alman and Song, Fast Attention Requires Bounded Entries, arXiv 2302.13214.
    """
    return approximate(
        query,
        key,
        value,
        tol=tol,
        scale=scale,
        is_causal=is_causal,
        key_mask=key_mask,
        method=method,
        guarantee=guarantee,
        rng=rng,
    ).value


def approximate(
    query: Array,
    key: Array,
    value: Array,
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    method: Method | None = None,
    guarantee: str = "sampled",
    rng: RandomSource = None,
) -> Approximation:
    """Softmax attention with its certificate, its plan and its log-sum-exps.

    The parameters and errors are those of :func:`attention`.

    Parameters
    ----------
    query, key, value : array, shapes (..., n, d), (..., m, d), (..., m, p)
        As in :func:`attention`; tuples of keys and of values, and of masks, mean
        :func:`tensor_attention`.
    tol, scale, is_causal, key_mask, method, guarantee, rng
        As in :func:`attention`.

    Returns
    -------
    Approximation
        ``value``, shape (..., n, p); ``certificate``; ``plan``; ``log_normalizer``,
        shape (..., n), the log-sum-exp of each row's logits. For a batch the fields of
        the certificate and the plan are arrays over the leading dimensions.
        The certificate is about ``value``. The error of ``log_normalizer`` is bounded
        by ``log_normalizer_error``, shape (..., n), for exact attention, proven
        polynomials and ``Quantized``. Where that is None, as for landmarks and
        clusters, or infinite, the log-sum-exps are not certified, and their errors may
        exceed one.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2048, 16)) * 0.4
    >>> answer = approximate(query, key, value, tol=5e-2, rng=0)
    >>> bool(answer.certificate.error <= 5e-2), answer.certificate.norm
    (True, 'relative-frobenius')
    """
    form = _form(key)
    problem = form.batch.of(query, key, value, scale, is_causal, key_mask)
    tol, method, generator = check_options(tol, method, guarantee, rng)

    def solve(head: Any, child: np.random.Generator) -> HeadAnswer:
        return form.solve(method, head, tol, guarantee, child)

    found = _each_head(problem, generator.spawn(problem.count), solve)
    answer: Approximation = problem.assemble(found)
    return answer


def explain(
    query: Array,
    key: Array,
    value: Array,
    *,
    tol: float = 1e-2,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    method: Method | None = None,
    guarantee: str = "sampled",
    rng: RandomSource = None,
    run: bool = False,
) -> Explanation:
    """Say what :func:`approximate` would run for each head, and why.

    Parameters
    ----------
    query, key, value : array, shapes (..., n, d), (..., m, d), (..., m, p)
        As in :func:`attention`; tuples as in :func:`approximate`.
    tol, scale, is_causal, key_mask, method, guarantee, rng
        As in :func:`attention`.
    run : bool, default False
        Also run every candidate, the refused ones too, and report its time, certified
        error and measured error. Candidates that are predicted to take more than five
        minutes are not run.

    Returns
    -------
    Explanation
        ``str()`` of it is a table: per head, each method, accepted or the reason of its
        refusal, predicted time and error; with ``run``, also the measured ones.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import explain
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 64, 8))
    >>> explain(query, key, value).heads[0][0].accepted
    True
    """
    form = _form(key)
    problem = form.batch.of(query, key, value, scale, is_causal, key_mask)
    tol, method, generator = check_options(tol, method, guarantee, rng)

    def consider(head: Any, child: np.random.Generator) -> tuple[Candidate, ...]:
        return tuple(form.candidates(method, head, tol, guarantee, child))

    streams = generator.spawn(problem.count)
    heads = tuple(_each_head(problem, streams, consider))
    if not run:
        return Explanation(problem.lead, heads)
    exact = form.exact(method)
    # sequentially, so that times are those of a single head
    runs = tuple(
        run_candidates(
            head.trimmed(), candidates, tol, guarantee, stream, form.solve, exact
        )
        for head, candidates, stream in zip(
            problem.heads(), heads, streams, strict=True
        )
    )
    return Explanation(problem.lead, heads, runs)


def _each_head(
    problem: Any,
    streams: list[np.random.Generator],
    work: Callable[[Any, np.random.Generator], _T],
) -> list[_T]:
    """Call ``work`` for every head with its own random stream, in parallel."""

    def one(number: int) -> _T:
        return work(problem.head(number).trimmed(), streams[number])

    return parallel_map(one, range(problem.count), problem.query)


@dataclass(frozen=True)
class _Form:
    """The functions for pairwise or for tensor attention."""

    batch: type[Any]
    solve: Callable[..., HeadAnswer]
    candidates: Callable[..., Iterator[Candidate]]
    # whether a method approximates exact attention, with which it can be compared
    exact: Callable[[Method], bool]


def _form(key: Any) -> _Form:
    """The form of attention by the type of ``key``; a tuple means tensor attention."""
    if not isinstance(key, tuple):
        return _Form(Batch, _solve, _candidates, lambda _: True)
    # imported on use: it would add a fifth to the time of import
    from fastattn.tensor.mechanisms import TensorMethod
    from fastattn.tensor.planning import solve_tensor, tensor_candidates
    from fastattn.tensor.problem import TensorBatch

    def exact(method: Method) -> bool:
        return not isinstance(method, TensorMethod)

    return _Form(TensorBatch, solve_tensor, tensor_candidates, exact)


def _solve(
    method: Method, head: Head, tol: float, guarantee: str, rng: np.random.Generator
) -> HeadAnswer:
    reason = _why_exact(method, head)
    if reason:
        return Exact().solve(head, tol, guarantee, rng, reason)
    return method.solve(head, tol, guarantee, rng)


def _candidates(method: Method, head: Head, *options: Any) -> Iterator[Candidate]:
    reason = _why_exact(method, head)
    if reason:
        return iter((Candidate(Exact().plan(head, reason), accepted=True),))
    return method.candidates(head, *options)


def _why_exact(method: Method, head: Head) -> str:
    """The reason why a head is exact whatever the method, or an empty string."""
    if not head.sizes[1]:
        return "there is no key to attend to"
    # approximate methods are planned and certified with logits of a sample
    if isinstance(method, Auto) and may_overflow(head):
        return f"logits may overflow {head.dtype}"
    return ""
