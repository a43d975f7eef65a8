"""Linear projections that preserve lengths: dense, sparse, by Hadamard.

Each is drawn with ``draw``, maps rows with ``apply`` and back with ``adjoint``, the
transpose; ``size_for`` is the number of coordinates for a relative error of lengths.
"""

import math
from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array, array_namespace, mover
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_integer, check_number
from sketching._ops.hadamard import hadamard
from sketching._ops.scatter import scatter_columns


@dataclass(frozen=True, slots=True, eq=False)
class GaussianProjection:
    r"""Projection by a matrix of independent normal numbers.

    The length of :math:`S x` over that of :math:`x` is the root of a chi-squared
    variable over its degrees of freedom, about :math:`N(1, 1 / (2 m))` for
    :math:`m` coordinates.

    Parameters
    ----------
    matrix : array, shape (d, size)
        The transpose of :math:`S`, entries of variance ``1 / size``.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import GaussianProjection
    >>> size = GaussianProjection.size_for(1000, eps=0.2)
    >>> size
    246
    >>> projection = GaussianProjection.draw(5000, size=size, rng=0)
    >>> projection.apply(np.ones((3, 5000))).shape
    (3, 246)

    References
    ----------
    Dasgupta and Gupta, An Elementary Proof of a Theorem of Johnson and Lindenstrauss,
    doi 10.1002/rsa.10073.
    """

    matrix: Array

    @staticmethod
    def draw(d: int, *, size: int, rng: RandomSource = None) -> "GaussianProjection":
        """Draw the projection of rows of ``d`` entries."""
        check_integer("d", d, least=1)
        check_integer("size", size, least=1)
        matrix = as_generator(rng).standard_normal((d, size))
        return GaussianProjection(matrix / math.sqrt(size))

    @staticmethod
    def size_for(n: int, *, eps: float, delta: float = 0.01) -> int:
        """Coordinates that preserve ``n`` lengths to a factor ``1 +- eps``.

        It is the least number for which the tails of the chi-squared distribution
        beyond ``(1 - eps)^2`` and ``(1 + eps)^2`` are at most ``delta / n``; the
        vectors must not depend on the projection. All pairs of N points are
        ``N (N - 1) / 2``.
        """
        from scipy.stats import chi2

        failure = _check_promise(n, eps, delta)

        def fails(size: int) -> bool:
            low = chi2.cdf(size * (1 - eps) ** 2, size)
            high = chi2.sf(size * (1 + eps) ** 2, size)
            return bool(low + high > failure)

        top = 1
        while fails(top):
            top *= 2
        low = top // 2
        while top - low > 1:
            midpoint = (low + top) // 2
            low, top = (midpoint, top) if fails(midpoint) else (low, midpoint)
        return top

    def apply(self, x: Array) -> Array:
        """Project the rows of ``x``, ``(..., n, d)``, to ``(..., n, size)``."""
        return array_namespace(x).matmul(x, mover(x, x.dtype)(self.matrix))

    def adjoint(self, y: Array) -> Array:
        """Map rows of ``size`` entries back by the transpose, to ``(..., n, d)``."""
        return array_namespace(y).matmul(y, mover(y, y.dtype)(self.matrix.T))


@dataclass(frozen=True, slots=True, eq=False)
class SparseProjection:
    r"""Projection by a matrix that is mostly zero.

    With ``nonzeros`` given, each entry of a row is added, with random signs, to that
    many coordinates: one is the count sketch, a few are OSNAP. Otherwise each entry of
    the matrix is zero but for a share ``density``; a third is Achlioptas' choice.

    Parameters
    ----------
    places : array of int, shape (d, s)
        The coordinates that each entry of a row is added to.
    weights : array, shape (d, s)
        The factors, signs over a root; 0 where an entry has fewer than ``s`` places.
    size : int
        The number of coordinates.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import SparseProjection
    >>> projection = SparseProjection.draw(5000, size=256, nonzeros=1, rng=0)
    >>> x = np.ones((1, 5000))
    >>> bool(abs(np.linalg.norm(projection.apply(x)) / np.linalg.norm(x) - 1) < 0.1)
    True

    References
    ----------
    Achlioptas, Database-friendly random projections, doi 10.1016/S0022-0000(03)00025-4.
    Nelson and Nguyen, OSNAP, arXiv 1211.1002.
    """

    places: Array
    weights: Array
    size: int

    @staticmethod
    def draw(
        d: int,
        *,
        size: int,
        nonzeros: int | None = None,
        density: float = 1 / 3,
        rng: RandomSource = None,
    ) -> "SparseProjection":
        """Draw the projection of rows of ``d`` entries."""
        check_integer("d", d, least=1)
        check_integer("size", size, least=1)
        check_number("density", density, above=0)
        generator = as_generator(rng)
        if nonzeros is not None:
            check_integer("nonzeros", nonzeros, least=1)
            if nonzeros > size:
                raise ValueError(f"nonzeros: expected at most {size}, got {nonzeros}")
            counts, scale = np.full(d, nonzeros), 1 / math.sqrt(nonzeros)
        else:
            if density > 1:
                raise ValueError(f"density: expected at most 1, got {density}")
            counts = generator.binomial(size, density, size=d)
            scale = 1 / math.sqrt(size * density)
        most = max(int(counts.max()), 1)
        signs = generator.choice([-scale, scale], (d, most))
        weights = np.where(np.arange(most) < counts[:, None], signs, 0.0)
        places = _distinct(generator, d, size, most)
        return SparseProjection(places, weights, size)

    @staticmethod
    def size_for(n: int, *, eps: float, delta: float = 0.01) -> int:
        """Coordinates that preserve ``n`` lengths to ``1 +- eps``, density >= 1/3.

        The moments of such a projection are at most those of a Gaussian one, so that
        Chernoff's bound holds. For fewer nonzeros no such constants are proven.
        """
        failure = _check_promise(n, eps, delta)
        square = eps * (2 - eps)
        return math.ceil(math.log(2 / failure) / (square**2 / 4 - square**3 / 6))

    def apply(self, x: Array) -> Array:
        """Project the rows of ``x``, ``(..., n, d)``, to ``(..., n, size)``."""
        move = mover(x, x.dtype)
        if self._is_dense:
            return array_namespace(x).matmul(x, move(self._matrix()))
        places = mover(x, array_namespace(x).int64)(self.places)
        return scatter_columns(x, places, move(self.weights), size=self.size)

    def adjoint(self, y: Array) -> Array:
        """Map rows of ``size`` entries back by the transpose, to ``(..., n, d)``."""
        xp, move = array_namespace(y), mover(y, y.dtype)
        if self._is_dense:
            return xp.matmul(y, move(self._matrix().T))
        total = xp.zeros((*y.shape[:-1], len(self.places)), dtype=y.dtype)
        for places, weights in zip(self.places.T, self.weights.T, strict=True):
            taken = xp.take(y, mover(y, xp.int64)(places), axis=-1)
            total = total + taken * move(weights)
        return total

    @property
    def _is_dense(self) -> bool:
        # additions at scattered places against products by BLAS
        return bool(self.places.shape[1] * 32 > self.size)

    def _matrix(self) -> Array:
        matrix = np.zeros((len(self.places), self.size))
        rows = np.arange(len(matrix))[:, None]
        matrix[rows, self.places] = self.weights
        return matrix


@dataclass(frozen=True, slots=True, eq=False)
class HadamardProjection:
    r"""Subsampled randomised Hadamard transform (SRHT).

    Random signs and the fast Walsh-Hadamard transform spread the length of a row
    evenly; then some of its coordinates are enough. A row takes ``d log d`` additions.

    Parameters
    ----------
    signs : array, shape (d,)
        The random signs.
    places : array of int, shape (size,)
        Which coordinates of the padded transform are used, below the next power of two.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import HadamardProjection
    >>> projection = HadamardProjection.draw(1000, size=200, rng=0)
    >>> x = np.eye(2, 1000)
    >>> np.linalg.norm(projection.apply(x), axis=1)
    array([1., 1.])

    References
    ----------
    Ailon and Chazelle, The Fast Johnson-Lindenstrauss Transform, doi 10.1137/060673096.
    """

    signs: Array
    places: Array

    @staticmethod
    def draw(d: int, *, size: int, rng: RandomSource = None) -> "HadamardProjection":
        """Draw the projection of rows of ``d`` entries; ``size`` at most their number.

        The number is that of the padded row, the next power of two.
        """
        check_integer("d", d, least=1)
        check_integer("size", size, least=1)
        padded = 1 << (d - 1).bit_length()
        if size > padded:
            raise ValueError(f"size: expected at most {padded}, got {size}")
        generator = as_generator(rng)
        signs = generator.choice([-1.0, 1.0], d)
        return HadamardProjection(signs, generator.choice(padded, size, replace=False))

    @staticmethod
    def size_for(n: int, *, eps: float, delta: float = 0.01) -> int:
        """As many coordinates as a Gaussian projection takes.

        The variance of a squared length is at most the Gaussian one, ``2 / size``,
        which is proven; that its tails are as light is supported by tests only.
        """
        return GaussianProjection.size_for(n, eps=eps, delta=delta)

    def apply(self, x: Array) -> Array:
        """Project the rows of ``x``, ``(..., n, d)``, to ``(..., n, size)``."""
        xp, d, size = array_namespace(x), len(self.signs), len(self.places)
        signed = x * mover(x, x.dtype)(self.signs / math.sqrt(size))
        padding = (*x.shape[:-1], (1 << (d - 1).bit_length()) - d)
        spread = xp.concat([signed, _zeros(x, padding)], axis=-1)
        return xp.take(hadamard(spread), mover(x, xp.int64)(self.places), axis=-1)

    def adjoint(self, y: Array) -> Array:
        """Map rows of ``size`` entries back by the transpose, to ``(..., n, d)``."""
        xp, d, size = array_namespace(y), len(self.signs), len(self.places)
        # coordinates that are not used read the zero that is appended
        source = np.full(1 << (d - 1).bit_length(), size)
        source[self.places] = np.arange(size)
        wide = xp.concat([y, _zeros(y, (*y.shape[:-1], 1))], axis=-1)
        wide = hadamard(xp.take(wide, mover(y, xp.int64)(source), axis=-1))
        return wide[..., :d] * mover(y, y.dtype)(self.signs / math.sqrt(size))


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """Zeros of the library, device and dtype of an array."""
    return mover(like, like.dtype)(np.zeros(shape))


def _distinct(generator: np.random.Generator, d: int, size: int, count: int) -> Array:
    """Draw for each of ``d`` rows ``count`` different places below ``size``."""
    if count == 1:
        return generator.integers(size, size=(d, 1))
    # where all are drawn at once, each row is a permutation's beginning
    order: Array = np.argsort(generator.random((d, size)), axis=1)[:, :count]
    return order


def _check_promise(n: int, eps: float, delta: float) -> float:
    """Check eps, delta and n; return the failure that each length may have."""
    check_integer("n", n, least=1)
    for name, x in (("eps", eps), ("delta", delta)):
        if check_number(name, x, above=0) >= 1:
            raise ValueError(f"{name}: expected a number below 1, got {x}")
    return delta / n
