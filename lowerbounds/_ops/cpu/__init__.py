"""Bodies of ops for NumPy arrays, compiled by numba."""
