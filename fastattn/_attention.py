"""The public calls: validate, choose, run, assemble."""

from collections.abc import Callable
from functools import singledispatch
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np

from fastattn.methods.exact import Exact, may_overflow
from fastattn.planning.auto import Auto
from fastattn.planning.explanation import Explanation, run_candidates
from fastattn.planning.options import check_options, check_pairwise, check_served
from fastattn.problem.batch import Batch, each_head
from fastattn.problem.head import Head
from fastattn.problem.plan import Candidate, HeadAnswer, Method, Task
from sketching._lib.arrays import Array
from sketching._lib.certificate import Approximation
from sketching._lib.random import RandomSource

if TYPE_CHECKING:
    from fastattn.tensor.problem import TensorHead

_T = TypeVar("_T")
_H = TypeVar("_H", Head, "TensorHead")
_H_co = TypeVar("_H_co", covariant=True)
# tolerance, guarantee, and a random stream for each head
_Options: TypeAlias = tuple[float, str, list[np.random.Generator]]
_Work: TypeAlias = Callable[[Method, Task[_H]], _T]


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
    tol, method, generator = check_options(tol, method, guarantee, rng)
    inputs = query, key, value, scale, is_causal, key_mask
    if isinstance(key, tuple):
        # imported on use: it would add a fifth to the time of import
        from fastattn.tensor.planning import solve_tensor, tensor_options
        from fastattn.tensor.problem import TensorBatch

        check_served(tensor_options, method)
        tuples = TensorBatch.of(*inputs)
        options = tol, guarantee, generator.spawn(tuples.count)
        return tuples.assemble(_each_head(tuples, solve_tensor, method, options))
    check_pairwise(method)
    batch = Batch.of(*inputs)
    options = tol, guarantee, generator.spawn(batch.count)
    return batch.assemble(_each_head(batch, _solve, method, options))


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
    tol, method, generator = check_options(tol, method, guarantee, rng)
    inputs = query, key, value, scale, is_causal, key_mask
    if isinstance(key, tuple):
        from fastattn.tensor.planning import (
            solve_tensor,
            tensor_candidates,
            tensor_options,
        )
        from fastattn.tensor.problem import TensorBatch

        check_served(tensor_options, method)
        tuples = TensorBatch.of(*inputs)
        options = tol, guarantee, generator.spawn(tuples.count)
        work = tensor_candidates, solve_tensor
        return _explained(tuples, *work, method, options, run)
    check_pairwise(method)
    batch = Batch.of(*inputs)
    options = tol, guarantee, generator.spawn(batch.count)
    return _explained(batch, _candidates, _solve, method, options, run)


class _Batch(Protocol[_H_co]):
    """Heads of attention over keys, or over tuples of keys."""

    @property
    def query(self) -> Array: ...
    @property
    def lead(self) -> tuple[int, ...]: ...
    @property
    def count(self) -> int: ...
    def head(self, number: int, /) -> _H_co: ...


def _task(batch: _Batch[_H], number: int, options: _Options) -> Task[_H]:
    tol, guarantee, streams = options
    return Task(batch.head(number).trimmed(), tol, guarantee, streams[number])


def _each_head(
    batch: _Batch[_H], work: _Work[_H, _T], method: Method, options: _Options
) -> list[_T]:
    """Call ``work`` for every head, in parallel."""

    def one(number: int) -> _T:
        return work(method, _task(batch, number, options))

    return each_head(batch.lead, batch.query, one)


def _explained(
    batch: _Batch[_H],
    candidates: _Work[_H, tuple[Candidate, ...]],
    solve: _Work[_H, HeadAnswer],
    method: Method,
    options: _Options,
    run: bool,
) -> Explanation:
    """Consider each head; with ``run`` also run its candidates."""
    heads = tuple(_each_head(batch, candidates, method, options))
    if not run:
        return Explanation(batch.lead, heads)
    # methods of tensor attention have logits of their own: nothing to compare with
    compare = not getattr(method, "needs_tuples", False)
    # sequentially, so that times are those of a single head
    runs = tuple(
        run_candidates(_task(batch, number, options), head, solve, compare)
        for number, head in enumerate(heads)
    )
    return Explanation(batch.lead, heads, runs)


def _solve(method: Method, task: Task[Head]) -> HeadAnswer:
    reason = _why_exact(method, task.head)
    if reason:
        return Exact().solve(*task, reason)
    return method.solve(*task)


def _candidates(method: Method, task: Task[Head]) -> tuple[Candidate, ...]:
    reason = _why_exact(method, task.head)
    if reason:
        return (Candidate(Exact().plan(task.head, reason), accepted=True),)
    return tuple(method.candidates(*task))


@singledispatch
def _why_exact(_method: Any, head: Head) -> str:
    """The reason why a head is exact whatever the method, or an empty string."""
    return "" if head.sizes[1] else "there is no key to attend to"


@_why_exact.register
def _why_exact_of_auto(_method: Auto, head: Head) -> str:
    # approximate methods are planned and certified with logits of a sample
    if head.sizes[1] and may_overflow(head):
        return f"logits may overflow {head.dtype}"
    return _why_exact(None, head)
