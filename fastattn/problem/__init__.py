"""The inputs of a call: heads and batches of heads, and what a plan is.

Beside them changes of coordinates, causal chunks, and statistics of rows.
"""
