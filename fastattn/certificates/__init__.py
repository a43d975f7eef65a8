"""Certificates: bounds on rounding, proven bounds, and errors of sampled rows.

A method without a proven bound runs here: outlier rows are recomputed, others sampled.
"""
