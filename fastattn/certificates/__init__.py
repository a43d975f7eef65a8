"""Certificates: bounds on rounding, proven bounds, and errors of sampled rows.

Methods without a proven bound run here: outlier rows are recomputed exactly, and the
error of the other rows is estimated on a sample of them.
"""
