"""Loops of fastattn: references here, numba bodies in cpu, CuPy bodies in gpu."""
