"""Files that are whole or not there; one writer for each folder; where a model runs."""
