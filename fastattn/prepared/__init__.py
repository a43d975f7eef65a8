"""Keys and values prepared once, for queries that come later.

KV buffers, key-value states and clusters, which grow, merge and are saved.
"""
