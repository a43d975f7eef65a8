"""Gradients of softmax attention: exact, low-rank, and by clusters of keys."""
