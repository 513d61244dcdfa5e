"""The paper's experiments: a grid of models, and the tables of their results."""
