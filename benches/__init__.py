"""Benchmarks: ratios of times in one run, of answers that were checked."""
