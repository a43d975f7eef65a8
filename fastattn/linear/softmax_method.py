"""Feature maps as methods of softmax attention, certified on sampled rows."""

import math
from collections.abc import Iterator
from typing import ClassVar, Protocol

import numpy as np

from fastattn.certificates.certify import certified
from fastattn.costs.work import seconds
from fastattn.linear.heads import LinearHead, least_total
from fastattn.linear.protocol import FeatureMap, Reader
from fastattn.problem.head import Head
from fastattn.problem.plan import (
    Candidate,
    ConfiguredMethod,
    HeadAnswer,
    Plan,
    candidate_of,
)
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError


class SoftmaxFeatures(FeatureMap, Protocol):
    """A feature map that approximates softmax weights, as a method of attention."""

    __slots__ = ()

    approximates_softmax: ClassVar[bool] = True

    def candidates(
        self,
        head: Head,
        tol: float,  # noqa: ARG002
        guarantee: str,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> Iterator[Candidate]:
        """Yield the plan, or the reason of a refusal."""
        yield candidate_of(self, lambda: _configured(self, head, guarantee).plan)

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or raise RefusalError."""
        answer = certified(head, _configured(self, head, guarantee), tol, rng)
        if not answer.error <= tol:
            raise RefusalError(
                f"{self} misses tol={tol:g}: {answer.error:.2e} on sampled rows; raise "
                "tol, or use Auto() or Exact()"
            )
        return answer


def _configured(
    feature_map: FeatureMap, head: Head, guarantee: str
) -> ConfiguredMethod:
    if guarantee == "proven":
        raise RefusalError(
            f"{feature_map} has no proven bound: use guarantee='sampled', "
            "Polynomial() or Exact()"
        )
    features = Reader.of(feature_map, head.query, head.scale)
    n, m, d, p = head.sizes
    width = features.key(head.key[:1, :])[0].shape[-1]
    work = (n + m) * width * (p + 1 + d)
    plan = Plan(feature_map, math.nan, seconds(work), "requested")

    def run(head: Head) -> tuple[Array, Array, Array]:
        xp = head.xp
        answer = LinearHead(head, features, np.arange(head.sizes[1])).answer()
        total = answer.total
        reliable = total > least_total(xp, total.dtype)
        reliable = xp.logical_and(reliable, xp.isfinite(total))
        logarithm = xp.log(xp.where(reliable, total, xp.ones_like(total))) + answer.log
        undefined = xp.full_like(total, xp.nan)
        return answer.value, xp.where(reliable, logarithm, undefined), reliable

    return ConfiguredMethod(plan, run, math.inf)
