"""Numba bodies; ``elementary`` holds the scalar functions that they share."""
