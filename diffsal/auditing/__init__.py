"""Can a model's heatmaps be believed? Measured, put into words, and on a page."""
