"""The methods of softmax attention for one head.

Exact attention, int8/bfloat16 matmuls, and a package each for polynomials, low ranks
and clusters of keys.
"""
