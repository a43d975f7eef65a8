"""The functions of a query in which a low-rank softmax is written.

They are ``r`` orthonormal Hermite polynomials and ``c`` exponentials ``exp(x . p -
|p|^2 / 2)`` at landmarks ``p``. Projecting ``exp(q . k)`` onto them, in least squares
under the normal law of the queries, needs inner products only: with a key,
``y^alpha / sqrt(alpha!)`` and ``exp(y . p)``, each times ``a(k)``; between two
landmarks, ``exp(p . p')``. No query is looked at.
"""

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastattn._ops.monomials import monomials
from fastattn.methods.lowrank.whitening import Whitening
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# without a limit, a coordinate with a mean square above 1/2 would get all monomials
_LARGEST_DEGREE = 12
# added to the landmarks' correlations, and what follows where rounding defeats it
_JITTERS = (1e-6, 1e-4, 1e-2)
# share of a landmark that sums in float32 do not tell from their rounding: undamped,
# what many polynomials leave of landmarks turned it into errors of some per cent
_NOISE = 1e-7
# share of the logits' variance in coordinates that landmarks may ignore
_IGNORED = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Hermite:
    """Multi-indices: each is its parent with one more of its last coordinate.

    Parameters
    ----------
    parent, coordinate, power : integer array, shape (r,)
        Index ``j`` is index ``parent[j] < j`` and ``coordinate[j]``, which is not
        before any other in it and which it has ``power[j]`` times; index 0 is empty,
        with power 1.
    factorial : array, shape (r,)
        The number ``alpha!``.
    """

    parent: Array
    coordinate: Array
    power: Array
    factorial: Array

    @staticmethod
    def of(spread: Array, rank: int) -> "Hermite":
        """Take the ``rank`` indices of largest energy ``E y^(2 alpha) / alpha!``.

        Best first. The two successors of an index repeat its last coordinate, or
        move that on; ``spread``, the mean squares of the coordinates, must not
        increase.
        """
        mean = [float(x) for x in spread]
        rows, energies, degrees, factorials = [(0, 0, 1)], [1.0], [0], [1.0]
        heap = [(-mean[0], 0, 0, 1)]
        while heap and len(rows) < rank:
            negative, parent, axis, power = heapq.heappop(heap)
            place, energy = len(rows), -negative
            rows.append((parent, axis, power))
            energies.append(energy)
            degrees.append(degrees[parent] + 1)
            factorials.append(factorials[parent] * power)
            if degrees[place] < _LARGEST_DEGREE:
                gain = mean[axis] * (2 * power + 1) / (power + 1)
                heapq.heappush(heap, (-energy * gain, place, axis, power + 1))
            if axis + 1 < len(mean):
                moved = energies[parent] * mean[axis + 1]
                heapq.heappush(heap, (-moved, parent, axis + 1, 1))
        parent, coordinate, power = np.array(rows, dtype=np.int64).T.copy()
        return Hermite(parent, coordinate, power, np.array(factorials))

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def op_arguments(self) -> dict[str, Any]:
        """The keywords of the ops."""
        return {
            "parent": self.parent,
            "coordinate": self.coordinate,
            "power": self.power,
        }

    def prefix(self, rank: int) -> "Hermite":
        """Return the first ``rank`` indices."""
        return Hermite(
            self.parent[:rank],
            self.coordinate[:rank],
            self.power[:rank],
            self.factorial[:rank],
        )

    def features(self, y: Array) -> Array:
        """Every ``y^alpha / sqrt(alpha!)`` of rows on the host: ``(c, r)``."""
        plain = monomials(y, parent=self.parent, coordinate=self.coordinate)
        return plain * (1 / np.sqrt(self.factorial)).astype(y.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """A frame, the indices of the polynomials, and the landmarks.

    Parameters
    ----------
    whitening : Whitening
        Coordinates, those that are used only.
    hermite : Hermite
        The polynomials, at least the constant.
    landmarks : array, shape (c, t)
        In the coordinates of the keys.
    """

    whitening: Whitening
    hermite: Hermite
    landmarks: Array
    _mixed: Array = field(init=False)
    _size: Array = field(init=False)
    _factor: Array = field(init=False)

    def __post_init__(self) -> None:
        marks = self.landmarks.astype(np.float64)
        mixed = self.hermite.features(marks)
        with np.errstate(over="ignore", invalid="ignore"):
            gram = np.exp(marks @ marks.T)
            noise = _NOISE * np.diag(gram)
            gram -= mixed @ mixed.T
            gram[np.diag_indices_from(gram)] += noise
            size = np.sqrt(np.diag(gram))
            gram *= 1 / size
            gram *= 1 / size[:, None]
        object.__setattr__(self, "_mixed", mixed)
        object.__setattr__(self, "_size", size)
        object.__setattr__(self, "_factor", _factor(gram))

    @staticmethod
    def fitting(
        whitening: Whitening, hermite: Hermite, *, landmarks: bool
    ) -> Whitening:
        """Drop the last coordinates that no polynomial, and no landmark, needs."""
        total = max(float(whitening.spread.sum()), np.finfo(np.float64).tiny)
        left = np.cumsum(whitening.spread[::-1])[::-1] / total
        ignored = _IGNORED if landmarks else 1.0
        used = max(int(hermite.coordinate.max()) + 1, int(np.sum(left > ignored)))
        return whitening.keep(used)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        whitening, index = self.whitening, self.hermite
        arrays = (
            whitening.center, whitening.to_key, whitening.to_query, whitening.origin,
            whitening.spread, index.parent, index.coordinate, index.power,
            self.landmarks, self._mixed, self._size, self._factor,
        )  # fmt: skip
        return sum(int(x.nbytes) for x in arrays)

    def project(self, sums: Array) -> Array:
        """Turn inner products with the functions, ``(r + c, w)``, into weights."""
        if not len(self.landmarks):
            return sums
        from scipy.linalg import cho_solve

        head, tail = sums[: len(self.hermite)], sums[len(self.hermite) :]
        right = (tail - self._mixed @ head) / self._size[:, None]
        solution = cho_solve((self._factor, True), right, check_finite=False)
        solution /= self._size[:, None]
        return np.concatenate([head - self._mixed.T @ solution, solution])

    def first(self, count: int) -> "Basis":
        """Keep the first functions only: the polynomials come before the landmarks."""
        rank = min(count, len(self.hermite))
        marks = max(count - len(self.hermite), 0)
        # the Cholesky factor of a leading block is the leading block of the factor
        kept = {
            "whitening": self.whitening,
            "hermite": self.hermite.prefix(rank),
            "landmarks": self.landmarks[:marks],
            "_mixed": self._mixed[:marks, :rank],
            "_size": self._size[:marks],
            "_factor": self._factor[:marks, :marks],
        }
        basis = object.__new__(Basis)
        for name, part in kept.items():
            object.__setattr__(basis, name, part)
        return basis

    def equals(self, other: "Basis") -> bool:
        """Whether sums over this basis and the other may be added."""
        if self is other:
            return True
        mine, theirs = (
            (
                x.whitening.center, x.whitening.to_key, x.whitening.to_query,
                x.landmarks, x.hermite.parent, x.hermite.coordinate,
                np.array([x.whitening.offset, x.whitening.longest, x.whitening.scale]),
            )
            for x in (self, other)
        )  # fmt: skip
        return all(map(np.array_equal, mine, theirs))


def _factor(gram: Array) -> Array:
    """Cholesky factor of the landmarks' correlations."""
    if not np.isfinite(gram).all():
        raise RefusalError(
            "the logits vary too much for landmarks: exp of their variance overflows"
        )
    diagonal = np.diag(gram).copy()
    for jitter in _JITTERS:
        np.fill_diagonal(gram, diagonal + jitter)
        try:
            return np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            continue
    raise RefusalError("the landmarks cannot be told apart in float64")
