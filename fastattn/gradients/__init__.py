"""Derivatives of softmax attention: exact, by low ranks, and by clusters of keys."""
