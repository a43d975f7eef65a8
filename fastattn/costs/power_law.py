"""Power laws through measured points, which searches extrapolate."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PowerLaw:
    r"""The law :math:`y (x' / x)^a` through a point :math:`(x, y)`, both positive.

    Errors of approximations are about power laws of a rank, a trace or a threshold:
    straight lines in logarithms, on which a secant search takes few steps.
    """

    x: float
    y: float
    exponent: float

    @staticmethod
    def fit(
        before: tuple[float, float],
        now: tuple[float, float],
        *,
        steeper: float = 1.0,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> "PowerLaw":
        """The law through two points, with its exponent times ``steeper``, clipped."""
        (u, v), (x, y) = before, now
        exponent = steeper * math.log(y / v) / math.log(x / u)
        return PowerLaw(x, y, min(max(exponent, least), most))

    def value(self, x: float) -> float:
        """The value at ``x``."""
        return float(self.y * (x / self.x) ** self.exponent)

    def solve(self, y: float) -> float:
        """Where the law has the value ``y``."""
        return float(self.x * (y / self.y) ** (1 / self.exponent))
