"""Attention of heads larger than memory, whose rows are read in blocks."""
