"""A table of what was considered for each head."""

import math
from dataclasses import dataclass

import numpy as np

from fastattn._problem import Candidate


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was considered for each head.

    Parameters
    ----------
    lead : tuple of int
        The leading dimensions of the batch.
    heads : tuple of tuple of Candidate
        For each head, in C order, its candidates in the order of consideration; the
        first accepted one would run.
    """

    lead: tuple[int, ...]
    heads: tuple[tuple[Candidate, ...], ...]

    def __str__(self) -> str:
        """Return a table of all candidates."""
        wide = max(len(str(c.plan.method)) for head in self.heads for c in head)
        lines = [
            f"{'head':<8} {'':<3} {'method':<{wide}} {'time':>9} {'error':>9}  why",
        ]
        for number, candidates in enumerate(self.heads):
            place = np.unravel_index(number, self.lead) if self.lead else ()
            name = ",".join(str(int(i)) for i in place) or "-"
            taken = False
            for candidate in candidates:
                mark = "->" if candidate.accepted and not taken else ""
                taken = taken or candidate.accepted
                plan = candidate.plan
                lines.append(
                    f"{name:<8} {mark:<3} {plan.method!s:<{wide}} "
                    f"{_seconds(plan.predicted_seconds):>9} "
                    f"{_number(plan.predicted_error):>9}  {plan.reason}"
                )
        return "\n".join(lines)


def _seconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value * 1e3:.1f} ms"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"
