"""Files that are whole or not there; one writer for each folder; CSV cells; where a model runs."""
