"""The inputs of a call: heads, batches of heads, and plans.

Further changes of coordinates, causal chunks, and statistics of rows.
"""
