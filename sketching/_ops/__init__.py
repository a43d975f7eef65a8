"""Loops of sketching: references here, numba bodies in cpu, CuPy bodies in gpu."""
