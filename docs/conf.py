"""The site: `sphinx-build -W -b html docs build/site`."""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this checkout, installed or not

import psjax  # noqa: E402

project = "psjax"
author = "The psjax authors"
project_copyright = author
version = release = psjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_psjax.docstrings",
    "sphinx_psjax.mathml",
    "sphinx_psjax.public_names",
    "sphinx_psjax.tables",
    "sphinx_psjax.messages",
]
exclude_patterns = ["sphinx_psjax", "api/examples", "**.ipynb_checkpoints"]
nitpicky = True
# What other packages define has its own site, which a build without network cannot ask.
nitpick_ignore_regex = [(r"py:.*", r"(?!psjax\.).*"), (r"py:.*", r"psjax\.(\w+\.)*_.*")]
suppress_warnings = ["misc.highlighting_failure"]  # notebooks show output as code

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/test_notebooks.py runs them; the site shows the outputs kept
nb_ipywidgets_js = {}

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
napoleon_attr_annotations = False
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "psjax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # the search field of the sidebar is enough
}
