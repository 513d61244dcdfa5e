"""Files that are whole or not there; where a model runs."""
