"""The documentation site: ``make docs`` writes it to docs/_build/html. Its pages open from disk, without a network."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from typing import Any

project = "sinklens"
author = "the sinklens authors"
copyright = "the sinklens authors, Apache-2.0"  # noqa: A001  (Sphinx reads this name)
version = release = version_of("sinklens")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # an attribute's name is looked up, and several classes have one of that name
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "sinklens"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_search_summary = False  # a summary would be fetched, which browsers forbid to pages opened from disk
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False


def without_outside_links(app: Any, page: str, source: list[str]) -> None:  # noqa: ARG001
    """Links from docs/*.md to other files of the repository work on a code host; the site has only their names."""
    if "/" not in page:
        source[0] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\.md(#[^)]*)?\)", r"\1", source[0])


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", without_outside_links)
