"""k-means and k-medians between whitened points."""
