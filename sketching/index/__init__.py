"""MahalanobisIndex: points under a metric that changes, and distances to them.

Its state, the modes that answer queries, and its files.
"""
