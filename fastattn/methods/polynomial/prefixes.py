"""Sums of monomials over the prefixes of the keys, as cumulative sums of chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fastattn.methods.polynomial.moments import Moments
from fastattn.problem.causal_chunks import Answer, Prefix, by_prefixes, panels
from fastattn.problem.head import Head
from sketching._lib.arrays import Array, mover
from sketching._lib.threads import parallel_map


@dataclass(frozen=True, slots=True, eq=False)
class _MomentsPrefix:
    """Moments with the coefficients of a polynomial; log-sum-exps of centred keys."""

    moments: Moments
    coefficients: Array

    def query(self, query: Array) -> Answer:
        """Compute the output of queries that attend to all keys of the prefix."""
        return self.moments.query(query, self.coefficients, centred=True)


def moments_by_prefixes(
    head: Head, moments: Callable[[Head], Moments], coefficients: Array
) -> Answer:
    """Compute a causal head by sums of monomials over prefixes of the keys.

    Keys are centred in the exact part, too: the logit with the mean key, which may be
    large, is then added once, after the outputs are merged.
    """
    xp = head.xp

    def part(keys: slice) -> Moments:
        return moments(replace(head, key=head.key[keys, :], value=head.value[keys, :]))

    def prefixes(counts: list[int]) -> Iterator[list[Prefix]]:
        total = None
        for panel in panels(counts, 8 * len(first.index) * (head.sizes[3] + 1)):
            some: list[Prefix] = []
            for one in parallel_map(part, panel, head.query):
                sums = xp.astype(one.sums, xp.float64)
                total = sums if total is None else total + sums
                whole = replace(one, sums=xp.astype(total, one.sums.dtype))
                some.append(_MomentsPrefix(whole, coefficients))
            yield some

    first = part(slice(0, 1))
    dtype = first.sums.dtype
    center = mover(head.key, dtype)(first.transform.key_center)
    centred = replace(
        head,
        query=xp.astype(head.query, dtype, copy=False),
        key=xp.astype(head.key, dtype, copy=False) - center,
    )
    value, logarithm, reliable = by_prefixes(centred, prefixes)
    return value, logarithm + first.center_logits(head.query), reliable
