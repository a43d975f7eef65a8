"""Loops of fastattn: references here, numba kernels in cpu, CuPy kernels in gpu."""
