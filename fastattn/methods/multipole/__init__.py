"""The multipole method: near field exactly, far field by moments of clusters."""
