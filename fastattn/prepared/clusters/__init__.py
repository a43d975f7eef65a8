"""Clusters of keys as a prepared structure of one head."""
