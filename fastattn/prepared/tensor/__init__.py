"""Prepared structures of one head of tensor attention."""
