r"""The basis functions of a low-rank softmax: Hermite polynomials and landmarks.

In whitened coordinates ``x`` of a query and ``y`` of a key, with :math:`x \sim N(0, I)`
and :math:`e^{q \cdot k} = a(k) e^{x \cdot y - |y|^2 / 2}` up to a factor of the query,
the basis consists of ``r`` orthonormal Hermite polynomials :math:`He_\alpha(x)` and
``c`` exponentials :math:`e^{x \cdot p - |p|^2 / 2}` at landmarks ``p``. The
least-squares projection of :math:`e^{q \cdot k}` under the Gaussian distribution of the
queries needs inner products only: :math:`y^\alpha / \sqrt{\alpha!}` and :math:`e^{y
\cdot p}`, each times ``a(k)``, with a key; :math:`e^{p \cdot p'}` between landmarks.
They are known in closed form, so that no query is evaluated.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._ops.lowrank import Functions
from fastattn._ops.monomials import monomials
from fastattn.costs.policy import POLICY
from fastattn.methods.lowrank.whitening import Whitening
from sketching._lib.arrays import Array
from sketching._lib.certificate import RefusalError

# ridge of the landmarks' Gram matrix; larger ones if the factorization fails
_JITTERS = (1e-6, 1e-4, 1e-2)
# float32 rounding of sums, relative to a landmark's squared norm: without this ridge
# landmarks whose residual after many polynomials is small amplified it to some per cent
_NOISE = 1e-7


@dataclass(frozen=True, slots=True, eq=False)
class Hermite:
    """Multi-indices of Hermite polynomials, each a parent times one coordinate.

    Parameters
    ----------
    parent, coordinate, power : integer array, shape (r,)
        Index ``j`` is index ``parent[j] < j`` with coordinate ``coordinate[j]`` raised
        to ``power[j]``; no coordinate of the parent comes after it. Index 0 is the
        constant, with power 1.
    factorial : array, shape (r,)
        ``alpha!``, the product of the factorials of the powers.
    """

    parent: Array
    coordinate: Array
    power: Array
    factorial: Array

    @staticmethod
    def of(spread: Array, rank: int) -> "Hermite":
        """Take the ``rank`` indices of largest energy ``E y^(2 alpha) / alpha!``.

        Best-first search with a heap: the successors of an index raise the power of
        its last coordinate by one, or replace this coordinate by the next one.
        ``spread``, shape (t,), are the mean squares of the coordinates, which must not
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
            if degrees[place] < POLICY.low_rank.largest_degree:
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
        """The keyword arguments of the ops in ``_ops.lowrank``."""
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
        """Features ``y^alpha / sqrt(alpha!)``, (c, r), of rows (c, t) on the host."""
        plain = monomials(y, parent=self.parent, coordinate=self.coordinate)
        return plain * (1 / np.sqrt(self.factorial)).astype(y.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Whitened coordinates, polynomial indices and landmarks.

    Parameters
    ----------
    whitening : Whitening
        The coordinates, without the trailing ones that are not used.
    hermite : Hermite
        The polynomials; the first is the constant.
    landmarks : array, shape (c, t)
        In the coordinates ``y`` of the keys.
    mixed : array, shape (c, r)
        Inner products of landmarks and polynomials.
    size, factor : array, shapes (c,) and (c, c)
        Norms of the landmarks less the polynomials, and the Cholesky factor of the Gram
        matrix of what is left, normalized.
    """

    whitening: Whitening
    hermite: Hermite
    landmarks: Array
    mixed: Array
    size: Array
    factor: Array

    @staticmethod
    def factorised(whitening: Whitening, hermite: Hermite, landmarks: Array) -> "Basis":
        """Factorise the Gram matrix of the landmarks.

        Raises
        ------
        RefusalError
            If the logits vary too much, or the landmarks are dependent.
        """
        marks = landmarks.astype(np.float64)
        mixed = hermite.features(marks)
        with np.errstate(over="ignore", invalid="ignore"):
            gram = np.exp(marks @ marks.T)
            noise = _NOISE * np.diag(gram)
            gram -= mixed @ mixed.T
            gram[np.diag_indices_from(gram)] += noise
            size = np.sqrt(np.diag(gram))
            gram *= 1 / size
            gram *= 1 / size[:, None]
        return Basis(whitening, hermite, landmarks, mixed, size, _factor(gram))

    @staticmethod
    def fitting(
        whitening: Whitening, hermite: Hermite, *, landmarks: bool
    ) -> Whitening:
        """Drop trailing coordinates that neither polynomials nor landmarks need."""
        total = max(float(whitening.spread.sum()), np.finfo(np.float64).tiny)
        left = np.cumsum(whitening.spread[::-1])[::-1] / total
        ignored = POLICY.low_rank.ignored if landmarks else 1.0
        used = max(int(hermite.coordinate.max()) + 1, int(np.sum(left > ignored)))
        return whitening.keep(used)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        whitening, index = self.whitening, self.hermite
        arrays = (
            whitening.center, whitening.to_key, whitening.to_query, whitening.origin,
            whitening.spread, index.parent, index.coordinate, index.power,
            self.landmarks, self.mixed, self.size, self.factor,
        )  # fmt: skip
        return sum(int(x.nbytes) for x in arrays)

    def functions(self, move: Callable[[Array], Array], log_unit: float) -> Functions:
        """The functions of queries, with weights in units of ``exp(log_unit)``."""
        whitening = self.whitening
        return Functions(
            move(whitening.to_query),
            move(np.append(whitening.origin[:-1], log_unit)),
            move(self.landmarks),
            move(whitening.spread / whitening.limit),
        )

    def project(self, sums: Array) -> Array:
        """Turn inner products with the basis, (r + c, w), into coefficients.

        Solves the normal equations; polynomials are orthonormal, so that only the Schur
        complement of the landmarks has to be factorized.
        """
        if not len(self.landmarks):
            return sums
        from scipy.linalg import cho_solve

        head, tail = sums[: len(self.hermite)], sums[len(self.hermite) :]
        right = (tail - self.mixed @ head) / self.size[:, None]
        solution = cho_solve((self.factor, True), right, check_finite=False)
        solution /= self.size[:, None]
        return np.concatenate([head - self.mixed.T @ solution, solution])

    def first(self, count: int) -> "Basis":
        """Keep the first ``count`` basis functions: polynomials, then landmarks."""
        rank = min(count, len(self.hermite))
        marks = max(count - len(self.hermite), 0)
        # the Cholesky factor of a leading block is the leading block of the factor
        return Basis(
            self.whitening,
            self.hermite.prefix(rank),
            self.landmarks[:marks],
            self.mixed[:marks, :rank],
            self.size[:marks],
            self.factor[:marks, :marks],
        )

    def equals(self, other: "Basis") -> bool:
        """Whether states over this basis and the other may be added."""
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
    """Cholesky factor of the landmarks' normalized Gram matrix, with a ridge."""
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
    raise RefusalError(
        "the landmarks are numerically dependent in float64: give fewer landmarks"
    )
