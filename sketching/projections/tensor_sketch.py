"""TensorSketch: sketches whose inner products are, on average, powers."""

from dataclasses import dataclass

import numpy as np

from sketching._lib.arrays import Array, array_namespace
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_integer


@dataclass(frozen=True, slots=True, eq=False)
class TensorSketch:
    r"""Sketch of the ``degree``-fold tensor product of a row with itself.

    It is the circular convolution of ``degree`` count sketches of the row. The mean of
    the product of two sketches is :math:`(x \cdot y)^p`, and its variance at most
    :math:`(2 + 3^p) |x|^{2p} |y|^{2p} / D` for the size :math:`D`.

    Parameters
    ----------
    matrices : tuple of array, shape (d, size)
        The count sketches: one random sign in each row.

    Examples
    --------
    >>> import numpy as np
    >>> from sketching import TensorSketch
    >>> sketch = TensorSketch.draw(3, size=4096, degree=2, rng=0)
    >>> x = np.array([[1.0, 2.0, 2.0]])
    >>> bool(abs((sketch.apply(x) @ sketch.apply(x).T).item() / 81 - 1) < 0.1)
    True

    References
    ----------
    Pham and Pagh, Fast and Scalable Polynomial Kernels via Explicit Feature Maps,
    doi 10.1145/2487575.2487591.
    """

    matrices: tuple[Array, ...]

    @staticmethod
    def draw(
        d: int, *, size: int, degree: int = 2, rng: RandomSource = None
    ) -> "TensorSketch":
        """Draw the sketches of rows of ``d`` entries."""
        check_integer("d", d, least=1)
        check_integer("size", size, least=1)
        check_integer("degree", degree, least=1)
        generator, matrices = as_generator(rng), []
        for _ in range(degree):
            matrix = np.zeros((d, size))
            places = generator.integers(size, size=d)
            matrix[np.arange(d), places] = generator.choice([-1.0, 1.0], d)
            matrices.append(matrix)
        return TensorSketch(tuple(matrices))

    def apply(self, x: Array) -> Array:
        """Sketch the rows of ``x``, ``(..., n, d)``."""
        return self._inverse(_product(self._spectra(x)))

    def vjp(self, x: Array, slope: Array) -> Array:
        """Differentiate ``sum(slope * apply(x))`` by ``x``."""
        xp = array_namespace(x, slope)
        spectra, spectrum = self._spectra(x), xp.fft.rfft(slope)
        total = xp.zeros_like(x)
        for j, matrix in enumerate(self.matrices):
            others = spectra[:j] + spectra[j + 1 :]
            change = spectrum * xp.conj(_product(others)) if others else spectrum
            back = xp.matrix_transpose(matrix)
            total = total + xp.matmul(self._inverse(change), back)
        return total

    def _spectra(self, x: Array) -> list[Array]:
        xp = array_namespace(x)
        return [xp.fft.rfft(xp.matmul(x, matrix)) for matrix in self.matrices]

    def _inverse(self, spectrum: Array) -> Array:
        xp = array_namespace(spectrum)
        return xp.fft.irfft(spectrum, n=self.matrices[0].shape[1])


def _product(factors: list[Array]) -> Array:
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product
