"""Kernels of the ops for NumPy arrays, compiled by numba."""
