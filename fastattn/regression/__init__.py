"""Regression by attention: losses of its output, and their gradients."""
