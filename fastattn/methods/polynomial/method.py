"""The polynomial method: low-rank softmax attention by monomials."""

import math
from dataclasses import dataclass, replace

import numpy as np

from fastattn.certificates.certify import certified, run_proven
from fastattn.certificates.sampled import SharedSampling
from fastattn.costs.work import polynomial_work
from fastattn.methods.lowrank.causal_cost import chunk_work, lowrank_cost
from fastattn.methods.lowrank.prefixes import lowrank_by_prefixes
from fastattn.methods.lowrank.structure import LowRank
from fastattn.methods.lowrank.whitening import PlanningSample
from fastattn.methods.polynomial.apriori import apriori_expansion
from fastattn.methods.polynomial.expansions import (
    LARGEST_BOUND,
    LARGEST_DEGREE,
    by_energy,
    rank_of,
    taylor,
    total_degree,
)
from fastattn.methods.polynomial.polynomial_expansion import (
    PolynomialExpansion,
    check_rank,
    coefficients_of,
)
from fastattn.methods.polynomial.proven import proven_expansion
from fastattn.problem.head import Head
from fastattn.problem.plan import Configurable, ConfiguredMethod, HeadAnswer, Plan
from fastattn.problem.rows import sample_rows
from fastattn.problem.transforms import balance
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError
from sketching._lib.validation import check_choice, check_integer

_BASES = ("minimax", "taylor", "hermite")


class _Default(str):
    """A default value, other than the same text where it is given."""

    __slots__ = ()


# degree where neither degree nor rank is given and nothing is proven
_DEFAULT_DEGREE = 2


@dataclass(frozen=True, slots=True)
class Polynomial(Configurable):
    r"""Softmax attention in linear time by a polynomial in place of exp.

    With :math:`p(x) = \sum_g c_g x^g` close to exp on the logits,
    :math:`p(u \cdot v) = \sum_\alpha c_{|\alpha|} \frac{|\alpha|!}{\alpha!}
    u^\alpha v^\alpha` is a sum over :math:`r = \binom{d+g}{g}` monomials. The sums over
    keys are computed once and used by every query: :math:`O((n + m) r (d + p))` work,
    and no array of size n x m or n x r.

    Parameters
    ----------
    degree : int, optional
        Degree of the polynomial. By default the least that meets the tolerance
        (``guarantee="proven"``), or 2.
    rank : int, optional
        Number of monomials, those with the most energy after balancing; by default
        all up to ``degree``.
    landmarks : int, optional
        Number of landmarks, keys or means of keys, whose exponentials are added to the
        basis, which is then "hermite". Landmarks without degree and rank are Nystrom
        attention.
    basis : {"minimax", "taylor", "hermite"}
        Minimax relative error on the interval of the logits; Taylor polynomial at 0; or
        Hermite polynomials, the least-squares fit for Gaussian queries. Only "minimax"
        can be proven. By default "minimax", with landmarks "hermite".

    Notes
    -----
    Keys and queries are centred and balanced first. With ``guarantee="sampled"``
    outlier rows (of high logit variance), and rows on which the method fails, are
    recomputed exactly. With ``is_causal=True`` a row uses the sums over all chunks of
    keys before its own chunk, and exact attention within it; a proven bound holds for
    every row nevertheless.

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
    basis: str = _Default("minimax")

    def __post_init__(self) -> None:
        if self.degree is not None:
            check_integer("degree", self.degree, least=0)
        if self.rank is not None:
            check_integer("rank", self.rank, least=1)
        check_integer("landmarks", self.landmarks, least=0)
        check_choice("basis", self.basis, _BASES)
        if self.degree == 0 and self.rank is not None and self.rank > 1:
            raise ValueError(f"rank: expected 1 with degree=0, got {self.rank}")
        if self.landmarks and self.basis != "hermite":
            if type(self.basis) is not _Default:
                raise ValueError(
                    f"basis: expected 'hermite' with landmarks={self.landmarks}, got "
                    f"{self.basis!r}"
                )
            object.__setattr__(self, "basis", "hermite")
        if self.fits_a_basis and None not in (self.degree, self.rank):
            raise ValueError(
                "degree, rank: expected one of them with basis='hermite', got degree="
                f"{self.degree} and rank={self.rank}"
            )

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or refuse."""
        configured = self.configure(head, tol, guarantee, rng)
        answer = answer_of(head, configured, tol, rng)
        if guarantee == "sampled" and answer.error > tol:
            raise RefusalError(
                f"{configured.plan.method} misses tol={tol:g}: {answer.error:.2e} on "
                "sampled rows; raise tol, degree or rank, or use Auto()"
            )
        return answer

    def configure(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> ConfiguredMethod:
        """Choose all parameters for one head."""
        if guarantee == "sampled" and self.fits_a_basis:
            empty = self.structure(head, rng)
            return configured_lowrank(head, empty, math.nan, "requested")
        if guarantee == "sampled" and self.basis == "minimax" and self.rank is None:
            degree = _DEFAULT_DEGREE if self.degree is None else self.degree
            known = apriori_expansion(head, degree, tol, rng)
            if known is not None:
                configured = configured_polynomial(
                    head, known[0], self.basis, "requested"
                )
                plan = replace(configured.plan, predicted_error=known[1])
                bound = configured.bound
                return replace(configured, plan=plan, bound=math.inf, limit=bound)
        expansion = self.expansion(head, tol, guarantee, rng)
        return configured_polynomial(head, expansion, self.basis, "requested")

    @property
    def fits_a_basis(self) -> bool:
        """Whether the method is a ``structure``, with a basis fitted to the head."""
        return self.basis == "hermite"

    def expansion(
        self,
        head: Head,
        tol: float,
        guarantee: str,
        rng: np.random.Generator,
        max_blocks: int | None = None,
    ) -> PolynomialExpansion:
        """Choose a polynomial; ``max_blocks`` as in ``proven_expansion``."""
        if guarantee != "proven":
            return self._sampled_expansion(head, rng)
        if self.basis != "minimax":
            raise RefusalError(
                f"basis={self.basis!r} has no proven bound, nor have landmarks: "
                "use 'minimax' without them"
            )
        return proven_expansion(head, tol, rng, self.degree, self.rank, max_blocks)

    def structure(self, head: Head, rng: np.random.Generator) -> LowRank:
        """Return the empty low-rank structure with a basis fitted to the head."""
        rank = self._hermite_rank(head.sizes[2])
        sample = PlanningSample.of(head, rng)
        return LowRank.plan(sample, rank=rank, landmarks=self.landmarks, rng=rng)

    def _hermite_rank(self, d: int) -> int:
        if self.rank is not None:
            return self.rank
        if self.degree is None and self.landmarks:
            # landmarks alone need only the constant polynomial
            return 1
        degree = _DEFAULT_DEGREE if self.degree is None else self.degree
        check_rank(d, degree, None)
        return rank_of(d, degree)

    def _sampled_expansion(
        self, head: Head, rng: np.random.Generator
    ) -> PolynomialExpansion:
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
        return PolynomialExpansion(
            transform,
            index,
            coefficients_of(self.basis, degree, bound),
            np.zeros(head.sizes[3]),
            head.dtype,
            math.inf,
        )


def configured_polynomial(
    head: Head, expansion: PolynomialExpansion, basis: str, reason: str
) -> ConfiguredMethod:
    """Configure the method of a given polynomial expansion."""
    degree = int(expansion.index.degree.max())
    method = Polynomial(degree=degree, rank=len(expansion.index), basis=basis)
    work = polynomial_work(*head.sizes, len(expansion.index))
    if head.prefix_lengths is not None:
        work += sum(chunk_work(head)[1:])
    if expansion.dtype == head.xp.float64 != head.dtype:
        work *= 2
    error = math.nan if math.isinf(expansion.bound) else expansion.bound
    plan = Plan(method, error, work, reason)
    return ConfiguredMethod(
        plan, expansion.answer, expansion.bound, log_errors=expansion.log_errors
    )


def configured_lowrank(
    head: Head, empty: LowRank, predicted_error: float, reason: str
) -> ConfiguredMethod:
    """Configure the method of a given empty low-rank structure."""
    rank, landmarks = empty.rank, empty.landmarks
    method = Polynomial(rank=rank, landmarks=landmarks, basis="hermite")
    work = lowrank_cost(head)(rank, landmarks)
    plan = Plan(method, predicted_error, work, reason)

    def run(head: Head) -> tuple[Array, Array, Array]:
        if head.prefix_lengths is not None:
            return lowrank_by_prefixes(head, empty)
        return empty.insert(head.key, head.value).query(head.query)

    return ConfiguredMethod(plan, run, math.inf)


def answer_of(
    head: Head,
    configured: ConfiguredMethod,
    tol: float,
    rng: np.random.Generator,
    shared: SharedSampling | None = None,
) -> HeadAnswer:
    """Run a configured method and certify it, whether or not it meets ``tol``."""
    plan = configured.plan
    if math.isfinite(configured.bound):
        value, normalizer = run_proven(head, configured)
        return HeadAnswer(
            value,
            normalizer,
            configured.bound,
            0.0,
            "max",
            f"minimax polynomial of degree {plan.method.degree} on the interval of all "
            "logits (Alman and Song 2023; relative error of weights)",
            plan,
            configured.log_errors and configured.log_errors(head, normalizer),
        )
    return certified(head, configured, tol, rng, shared)
