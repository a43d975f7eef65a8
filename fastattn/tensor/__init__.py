"""Tensor attention, over tuples of keys: heads, bounds, methods, and their choice."""
