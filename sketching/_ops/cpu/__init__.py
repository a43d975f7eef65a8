"""Numba kernels; ``elementary`` holds the scalar functions that they share."""
