"""Mahalanobis metrics: factors, covariances, and how rounding changes distances."""
