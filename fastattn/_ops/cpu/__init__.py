"""Numba kernels of the ops, same file and function names as the references."""
