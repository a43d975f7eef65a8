"""The polynomial method: low-rank softmax attention by monomials."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from fastattn._costs import polynomial_work, seconds
from fastattn._fitted import fit
from fastattn._problem import Candidate, Head, HeadAnswer, Plan
from fastattn._proven import proven_recipe
from fastattn._recipes import (
    Recipe,
    check_rank,
    coefficients_of,
    run,
    run_mended,
    sample_rows,
)
from fastattn._sampling import FAILURE, certify_rows, hardest_rows
from fastattn.expansions import LARGEST_DEGREE, by_energy, rank_of, taylor, total_degree
from fastattn.transforms import balance
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_choice, check_integer

_BASES = ("minimax", "taylor", "fitted")
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
        Keys that correct the remainder of the polynomial; not available yet, any
        number but 0 is refused.
    basis : {"minimax", "taylor", "fitted"}
        The polynomial: least largest relative error on the interval of the logits,
        Taylor at 0, or least squares on sampled logits (not with "proven").

    Notes
    -----
    Keys and queries are centred and balanced first. With ``guarantee="sampled"`` the
    rows whose logits spread most, and rows that went wrong, are computed exactly.

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
        try:
            recipe = self.recipe(head, tol, guarantee, rng)
            yield Candidate(plan_of(head, recipe, self.basis, "asked for"), True)
        except RefusalError as error:
            yield Candidate(Plan(self, math.nan, math.nan, str(error)), False)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or refuse."""
        recipe = self.recipe(head, tol, guarantee, rng)
        plan = plan_of(head, recipe, self.basis, "asked for")
        answer = answer_of(head, recipe, plan, tol, guarantee, rng)
        if guarantee == "sampled" and answer.error > tol:
            raise RefusalError(
                f"{plan.method} misses tol={tol:g}: {answer.error:.2e} on sampled "
                "rows; raise tol, degree or rank, or use Auto()"
            )
        return answer

    def recipe(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> Recipe:
        """Make every choice for one head."""
        if head.visible is not None:
            raise RefusalError(
                "Polynomial() does not take is_causal=True: use Exact() or Auto()"
            )
        if self.landmarks:
            raise RefusalError(
                f"landmarks={self.landmarks}: corrections by landmark keys are not "
                "available; use landmarks=0"
            )
        if guarantee == "proven":
            if self.basis != "minimax":
                raise RefusalError(
                    f"basis={self.basis!r} has no proven bound: use 'minimax'"
                )
            return proven_recipe(head, tol, rng, self.degree, self.rank)
        return self._sampled_recipe(head, rng)

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
        u = (query - transform.query_center) @ transform.query_map
        v = (key - transform.key_center) @ transform.key_map
        logits = u[:256] @ v[:2048].T
        if self.basis == "fitted":
            peak = logits.max(axis=1, keepdims=True)
            (coefficients,) = fit(logits, np.exp(-peak), range(degree, degree + 1))
        else:
            bound = min(float(np.abs(logits).max()), 8.0)
            coefficients = coefficients_of(self.basis, degree, bound)
        index = (
            total_degree(d, degree)
            if self.rank is None
            else by_energy(transform.scales, taylor(degree), self.rank)
        )
        middle = np.zeros(head.sizes[3])
        return Recipe(
            transform, index, coefficients, middle, head.dtype, math.inf, math.nan
        )


def plan_of(head: Head, recipe: Recipe, basis: str, reason: str) -> Plan:
    """Describe a recipe by the method that it makes concrete."""
    degree = int(recipe.index.degree.max())
    method = Polynomial(degree=degree, rank=len(recipe.index), basis=basis)
    error = recipe.predicted_error if math.isinf(recipe.bound) else recipe.bound
    work = polynomial_work(*head.sizes, len(recipe.index))
    if recipe.dtype == head.xp.float64 != head.dtype:
        work *= 2
    return Plan(method, error, seconds(work), reason)


def answer_of(
    head: Head,
    recipe: Recipe,
    plan: Plan,
    tol: float,
    guarantee: str,
    rng: np.random.Generator,
) -> HeadAnswer:
    """Run a recipe and attach its certificate, whether or not it meets ``tol``."""
    if guarantee == "proven":
        value, normalizer = run(head, recipe)
        return HeadAnswer(
            value,
            normalizer,
            recipe.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {plan.method.degree} on the interval of all "
            "logits (Alman and Song 2023; relative error of weights)",
            plan,
        )
    value, normalizer, settled = run_mended(head, recipe, hardest_rows(head, rng))
    sampled = certify_rows(head, value, tol, rng, settled=settled)
    return HeadAnswer(
        value,
        normalizer,
        sampled.upper,
        FAILURE,
        "relative-frobenius",
        sampled.source,
        replace(plan, predicted_error=sampled.estimate)
        if math.isnan(plan.predicted_error)
        else plan,
    )
