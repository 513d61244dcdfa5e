"""Does a map tell the truth? Measures of maps against the model and against people."""
