"""Loops of sketching: references here, numba kernels in cpu, CuPy kernels in gpu."""
