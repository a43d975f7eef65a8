"""Low-rank attention fitted to a head: basis functions, landmarks, rank search."""
