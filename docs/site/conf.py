"""Sphinx builds the site from the pages in docs/ and the package's docstrings: `make docs`.

Nothing is fetched while it builds, nor when it is read. Formulas are rendered at build by KaTeX; its style sheet and
fonts, and mermaid.js for the diagrams of layering.md, are copied from what the Makefile laid beside the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from formulas import BROWSER  # noqa: E402
from pages import absent  # noqa: E402

import pmrl_kernels  # noqa: E402

project = "pmrl_kernels"
author = "The pmrl_kernels authors"
copyright = author
version = release = pmrl_kernels.__version__

extensions = [
    "formulas",
    "myst_nb",
    "pages",
    "results",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]

exclude_patterns = [f"{page}.*" for page in absent()]
nitpicky = True
smartquotes_action = "D"  # dashes alone: options are quoted as in code

# Markdown and notebooks
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
nb_execution_mode = "off"
nb_merge_streams = True

# Docstrings. They state types and shapes themselves; signatures with types would say it all twice.
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
napoleon_use_param = False  # one entry where several arguments share a text
napoleon_use_rtype = False
napoleon_custom_sections = [
    "Copies and pickles",
    "Degenerate queries and candidates",
    "Degenerate cases",
    "Gradient",
    "Memory",
    "Over processes",
    "Without a score",
]

html_math_renderer = "katex"

html_theme = "furo"
pygments_dark_style = "a11y-dark"  # Furo's own underlines modules like links
html_title = "pmrl_kernels"
html_static_path = ["static", str(BROWSER)]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False

# `make docs-links` alone asks the network.
linkcheck_anchors = False
linkcheck_timeout = 20
