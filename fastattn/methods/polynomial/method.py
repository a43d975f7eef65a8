"""The polynomial method: low-rank softmax attention by monomials."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fastattn.certificates.certify import certified, run_proven
from fastattn.certificates.sampled import Looks
from fastattn.costs.work import polynomial_work, seconds
from fastattn.methods.lowrank.causal_cost import chunk_work, lowrank_cost
from fastattn.methods.lowrank.prefixes import lowrank_by_prefixes
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import Sample
from fastattn.methods.polynomial.apriori import apriori_recipe
from fastattn.methods.polynomial.expansions import (
    LARGEST_BOUND,
    LARGEST_DEGREE,
    by_energy,
    rank_of,
    taylor,
    total_degree,
)
from fastattn.methods.polynomial.proven import proven_recipe
from fastattn.methods.polynomial.recipe import Recipe, check_rank, coefficients_of
from fastattn.problem.head import Head
from fastattn.problem.plan import Attempt, Candidate, HeadAnswer, Plan, candidate_of
from fastattn.problem.rows import sample_rows
from fastattn.problem.transforms import balance
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_choice, check_integer

_BASES = ("minimax", "taylor", "hermite")
# degree where neither degree nor rank is given and nothing is proven
_DEFAULT_DEGREE = 2


@dataclass(frozen=True, slots=True)
class Polynomial:
    r"""Softmax attention in linear time by a polynomial in place of exp.

    With :math:`p(x) = \sum_g c_g x^g` near exp on the logits,
    :math:`p(u \cdot v) = \sum_\alpha c_{|\alpha|} \frac{|\alpha|!}{\alpha!}
    u^\alpha v^\alpha` is a sum over :math:`\binom{d+g}{g}` monomials, so that sums
    over all keys are made once and used by every query: :math:`O(r (d + p))` for each
    query and key, nothing of size n x m or n x r.

    Parameters
    ----------
    degree : int, optional
        Degree of the polynomial. By default the least that meets the tolerance
        (``guarantee="proven"``), or 2.
    rank : int, optional
        Keep this many monomials, those with the most energy after balancing; by
        default all up to ``degree``.
    landmarks : int, optional
        Keys, or means of keys, that correct the remainder of the polynomial; the
        basis is then "hermite". Landmarks without degree and rank are Nystrom
        attention.
    basis : {"minimax", "taylor", "hermite"}
        Least largest relative error on the interval of the logits; Taylor at 0; or
        Hermite polynomials of the queries as if those were normal, which is least
        squares over them. Only "minimax" can be proven.

    Notes
    -----
    Keys and queries are centred and balanced first. With ``guarantee="sampled"`` the
    rows whose logits spread most, and rows that went wrong, are computed exactly.
    With ``is_causal=True`` sums run over the chunks of keys before a row's own, within
    which it is computed exactly; a proven bound holds for every row all the same.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import Polynomial, approximate
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.uniform(-1, 1, (3, 512, 4))
    >>> answer = approximate(
    ...     query, key, value, tol=1e-3, method=Polynomial(), guarantee="proven"
    ... )
    >>> answer.plan.method.degree, answer.certificate.failure
    (5, 0.0)

    References
    ----------
    Alman and Song, Fast Attention Requires Bounded Entries, arXiv 2302.13214.
    Aggarwal and Alman, Optimal-Degree Polynomial Approximations for Exponentials and
    Gaussian Kernel Density Estimation, doi 10.4230/LIPIcs.CCC.2022.22.
    """

    degree: int | None = None
    rank: int | None = None
    landmarks: int = 0
    basis: str = "minimax"

    def __post_init__(self) -> None:
        if self.degree is not None:
            check_integer("degree", self.degree, least=0)
        if self.rank is not None:
            check_integer("rank", self.rank, least=1)
        check_integer("landmarks", self.landmarks, least=0)
        check_choice("basis", self.basis, _BASES)

    def candidates(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Iterator[Candidate]:
        """Say what would run, or why it would be refused."""
        yield candidate_of(self, lambda: self.attempt(head, tol, guarantee, rng).plan)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or refuse."""
        attempt = self.attempt(head, tol, guarantee, rng)
        answer = answer_of(head, attempt, tol, rng)
        if guarantee == "sampled" and answer.error > tol:
            raise RefusalError(
                f"{attempt.plan.method} misses tol={tol:g}: {answer.error:.2e} on "
                "sampled rows; raise tol, degree or rank, or use Auto()"
            )
        return answer

    def attempt(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Attempt:
        """Make every choice for one head."""
        if guarantee == "sampled" and self.fits_a_basis:
            empty = self.structure(head, rng)
            return lowrank_attempt(head, empty, math.nan, "asked for")
        if guarantee == "sampled" and self.basis == "minimax" and self.rank is None:
            degree = _DEFAULT_DEGREE if self.degree is None else self.degree
            known = apriori_recipe(head, degree, tol, rng)
            if known is not None:
                attempt = attempt_of(head, known[0], self.basis, "asked for")
                plan = replace(attempt.plan, predicted_error=known[1])
                bound = attempt.bound
                return replace(attempt, plan=plan, bound=math.inf, limit=bound)
        recipe = self.recipe(head, tol, guarantee, rng)
        return attempt_of(head, recipe, self.basis, "asked for")

    @property
    def fits_a_basis(self) -> bool:
        """Whether a ``structure`` answers, with a basis fitted to queries and keys."""
        return self.basis == "hermite" or self.landmarks > 0

    def recipe(
        self,
        head: Head,
        tol: float,
        guarantee: str,
        rng: np.random.Generator,
        pieces: int | None = None,
    ) -> Recipe:
        """Choose monomials and a polynomial; ``pieces`` is of ``proven_recipe``."""
        if guarantee != "proven":
            return self._sampled_recipe(head, rng)
        if self.basis != "minimax" or self.landmarks:
            raise RefusalError(
                f"basis={self.basis!r} has no proven bound, nor have landmarks: "
                "use 'minimax' without them"
            )
        return proven_recipe(head, tol, rng, self.degree, self.rank, pieces)

    def structure(self, head: Head, rng: np.random.Generator) -> LowRank:
        """Make the empty low-rank structure of a basis fitted to the head."""
        if self.basis == "taylor":
            raise RefusalError("landmarks do not correct a Taylor polynomial")
        rank = self._hermite_rank(head.sizes[2])
        sample = Sample.of(head, rng)
        return LowRank.plan(sample, rank=rank, landmarks=self.landmarks, rng=rng)

    def _hermite_rank(self, d: int) -> int:
        if self.rank is not None:
            return self.rank
        if self.degree is None and self.landmarks:
            # landmarks alone need the constant only
            return 1
        degree = _DEFAULT_DEGREE if self.degree is None else self.degree
        check_rank(d, degree, None)
        return rank_of(d, degree)

    def _sampled_recipe(self, head: Head, rng: np.random.Generator) -> Recipe:
        query, key = sample_rows(head, rng)
        transform = balance(query, key, head.scale, queries=False)
        d = transform.query_map.shape[1]
        degree = self.degree
        if degree is None:
            degree = _DEFAULT_DEGREE
            while rank_of(d, degree) < (self.rank or 1) and degree < LARGEST_DEGREE:
                degree += 1
        check_rank(d, degree, self.rank)
        u = (query[:256] - transform.query_center) @ transform.query_map
        v = (key[:2048] - transform.key_center) @ transform.key_map
        bound = float(np.abs(u @ v.T).max())
        if math.isnan(bound):
            raise RefusalError(
                "sampled logits overflow: scale query or key down, or use Exact()"
            )
        bound = min(bound, LARGEST_BOUND)
        index = (
            total_degree(d, degree)
            if self.rank is None
            else by_energy(transform.scales, taylor(degree), self.rank)
        )
        return Recipe(
            transform,
            index,
            coefficients_of(self.basis, degree, bound),
            np.zeros(head.sizes[3]),
            head.dtype,
            math.inf,
        )


def attempt_of(head: Head, recipe: Recipe, basis: str, reason: str) -> Attempt:
    """Describe a recipe by the method that it makes concrete."""
    degree = int(recipe.index.degree.max())
    method = Polynomial(degree=degree, rank=len(recipe.index), basis=basis)
    work = polynomial_work(*head.sizes, len(recipe.index))
    if head.visible is not None:
        work += sum(chunk_work(head)[1:])
    if recipe.dtype == head.xp.float64 != head.dtype:
        work *= 2
    error = math.nan if math.isinf(recipe.bound) else recipe.bound
    plan = Plan(method, error, seconds(work), reason)
    return Attempt(plan, recipe.answer, recipe.bound, log_errors=recipe.log_errors)


def lowrank_attempt(
    head: Head, empty: LowRank, predicted_error: float, reason: str
) -> Attempt:
    """Describe an empty low-rank structure by the method that it makes concrete."""
    rank, landmarks = empty.rank, empty.landmarks
    method = Polynomial(rank=rank, landmarks=landmarks, basis="hermite")
    work = lowrank_cost(head)(rank, landmarks)
    plan = Plan(method, predicted_error, seconds(work), reason)

    def run(head: Head) -> tuple[Array, Array, Array]:
        if head.visible is not None:
            return lowrank_by_prefixes(head, empty)
        return empty.insert(head.key, head.value).query(head.query)

    return Attempt(plan, run, math.inf)


def answer_of(
    head: Head,
    attempt: Attempt,
    tol: float,
    rng: np.random.Generator,
    looks: Looks | None = None,
) -> HeadAnswer:
    """Run an attempt and attach its certificate, whether or not it meets ``tol``."""
    plan = attempt.plan
    if math.isfinite(attempt.bound):
        value, normalizer = run_proven(head, attempt)
        return HeadAnswer(
            value,
            normalizer,
            attempt.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {plan.method.degree} on the interval of all "
            "logits (Alman and Song 2023; relative error of weights)",
            plan,
            attempt.log_errors and attempt.log_errors(head, normalizer),
        )
    return certified(head, attempt, tol, rng, looks)
