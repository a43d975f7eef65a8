"""The multipole method: the near field exactly, the far field by cluster moments."""
