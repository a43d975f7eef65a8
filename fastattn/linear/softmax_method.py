"""Feature maps as methods of softmax attention, certified on sampled rows."""

import math
from typing import ClassVar, Protocol

import numpy as np

from fastattn.certificates.certify import certified
from fastattn.linear.heads import LinearHead, least_total
from fastattn.linear.protocol import FeatureMap, Reader
from fastattn.problem.head import Head
from fastattn.problem.plan import Configurable, ConfiguredMethod, HeadAnswer, Plan
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError


class SoftmaxFeatures(FeatureMap, Configurable, Protocol):
    """A feature map that approximates softmax weights, as a method of attention."""

    __slots__ = ()

    approximates_softmax: ClassVar[bool] = True

    def solve(
        self, head: Head, tol: float, guarantee: str, rng: np.random.Generator
    ) -> HeadAnswer:
        """Run the method and certify the answer, or raise RefusalError."""
        answer = certified(head, self.configure(head, tol, guarantee, rng), tol, rng)
        if not answer.error <= tol:
            raise RefusalError(
                f"{self} misses tol={tol:g}: {answer.error:.2e} on sampled rows; raise "
                "tol, or use Auto() or Exact()"
            )
        return answer

    def configure(
        self,
        head: Head,
        tol: float,  # noqa: ARG002
        guarantee: str,
        rng: np.random.Generator,  # noqa: ARG002
    ) -> ConfiguredMethod:
        """Take the map as it is."""
        if guarantee == "proven":
            raise RefusalError(
                f"{self} has no proven bound: use guarantee='sampled', "
                "Polynomial() or Exact()"
            )
        features = Reader.of(self, head.query, head.scale)
        n, m, d, p = head.sizes
        width = features.key(head.key[:1, :])[0].shape[-1]
        work = (n + m) * width * (p + 1 + d)
        plan = Plan(self, math.nan, work, "requested")

        def run(head: Head) -> tuple[Array, Array, Array]:
            xp = head.xp
            answer = LinearHead(head, features, np.arange(head.sizes[1])).answer()
            total = answer.total
            reliable = total > least_total(xp, total.dtype)
            reliable = xp.logical_and(reliable, xp.isfinite(total))
            logarithm = (
                xp.log(xp.where(reliable, total, xp.ones_like(total))) + answer.log
            )
            undefined = xp.full_like(total, xp.nan)
            return answer.value, xp.where(reliable, logarithm, undefined), reliable

        return ConfiguredMethod(plan, run, math.inf)
