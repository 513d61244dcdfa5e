"""From a weights file to a model."""
