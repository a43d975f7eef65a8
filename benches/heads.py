"""Heads to measure on, each with its exact answer in float64 computed once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from benches.cases import CASES, heads_of, packaged_heads
from benches.measure import exact_rows


@dataclass(frozen=True)
class Head:
    """Query, key and value of one head."""

    name: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale: float

    def __len__(self):
        return len(self.query)

    @property
    def arrays(self):
        """Query, key and value."""
        return self.query, self.key, self.value

    @cached_property
    def truth(self):
        """Attention from the definition, in float64, a block of rows at a time."""
        blocks = [slice(s, s + 512) for s in range(0, len(self), 512)]
        return np.concatenate(
            [exact_rows(*self.arrays, rows, scale=self.scale) for rows in blocks]
        )

    def error(self, answer) -> float:
        """Relative Frobenius error of an answer."""
        difference = np.asarray(answer, dtype=np.float64) - self.truth
        return float(np.linalg.norm(difference) / np.linalg.norm(self.truth))


def file_heads(data) -> Iterator[Head]:
    """Yield the heads of files."""
    return (Head(*head) for path in data for head in heads_of(path))


def real_heads(data, *, each=None, least=0) -> Iterator[Head]:
    """Yield the packaged heads and those of files: at most ``each`` of one file."""
    every = [packaged_heads(), *(heads_of(path) for path in data)]
    found = (Head(*head) for heads in every for head in heads)
    for _, heads in groupby(found, key=lambda head: head.name.partition("[")[0]):
        yield from [head for head in heads if len(head) >= least][:each]


def case_head(name: str, n: int) -> Head:
    """Make the head of a synthetic case."""
    case = CASES[name]
    arrays = case.inputs(n, np.random.default_rng(0))
    return Head(f"{name}@{n}", *arrays, case.scale)
