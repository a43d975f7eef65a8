"""Keys and values prepared once, for queries that come later.

KV buffers, key-value states and clusters, to which keys are added, and which can be
merged and saved.
"""
