"""Configuration of the documentation site: `make docs` builds it into site/."""

import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")

# This checkout, and not another installed one, is documented here and imported in the notebooks' processes.
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

project = "keras-gradtools"
author = "the keras-gradtools developers"
copyright = author
version = release = re.search(r'__version__ = "(.*)"', (ROOT / "keras_gradtools/__init__.py").read_text("utf-8"))[1]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
    "japanese_search",
    "notebooks",
    "reference",
]
templates_path = ["_templates"]
exclude_patterns = ["_ext", "_templates"]
suppress_warnings = ["mystnb.unknown_mime_type"]

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
autosummary_generate = False
default_role = "literal"
napoleon_custom_sections = ["Cost", ("Attributes", "params_style"), ("Call arguments", "params_style")]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
add_module_names = True
toc_object_entries_show_parents = "hide"

# A notebook's outputs depend on the backend, so each backend has a cache of its own.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "out" / "docs" / f"cache-{BACKEND}")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

html_theme = "pydata_sphinx_theme"
html_title = "keras-gradtools"
html_search_language = "en_ja"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["tables.js", "search.js"]
# The switcher reads this file from the root of the server. A release adds an entry for itself, and its site is built
# into a folder of its own: `make docs SITE=site/0.3.0`.
html_extra_path = ["versions.json"]
html_theme_options = {
    "article_header_end": ["notebook.html"],
    "footer_start": ["copyright"],
    "check_switcher": False,
    "footer_end": [],
    "header_links_before_dropdown": 4,
    "navbar_end": ["version-switcher", "theme-switcher"],
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "switcher": {"json_url": "/versions.json", "version_match": version},
    "use_edit_page_button": False,
}
# Pages without pages below them have nothing to list on the left.
html_sidebars = {"index": [], "start": []}
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# `make docs-links` checks the links inside the site. Others change without us.
linkcheck_ignore = [r"https?://.*"]
