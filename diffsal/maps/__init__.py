"""Maps of a model's evidence: the only class activation code of the package."""
