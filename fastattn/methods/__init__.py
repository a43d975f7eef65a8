"""The methods of softmax attention, each a recipe for one head.

Exact attention, int8/bfloat16 matmuls, and a room each for polynomials, low ranks and
clusters of keys.
"""
