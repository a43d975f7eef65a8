"""The polynomial method: monomials of bounded degree, proven or sampled."""
