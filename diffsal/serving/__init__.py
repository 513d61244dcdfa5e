"""A local page to play with a model: what speaks for and against, and whether maps can lie."""
