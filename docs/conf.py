"""How `make docs` builds the pages; Sphinx reads this file."""

import diffsal

project = "diffsal"
author = "the diffsal authors"
copyright = "the diffsal authors, Apache-2.0"
version = release = diffsal.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["results/*.jinja", "results/*.py", "results/*.json"]
# Heads of generated tables skip a level; two modules have a Score, each of its own kind.
suppress_warnings = ["myst.header", "ref.python"]
templates_path = ["_templates"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "diffsal"
html_copy_source = False
