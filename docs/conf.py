"""Sphinx: `make docs` builds these pages into build/docs; a warning is an error.

The notebooks are run anew each time, without a network, and an error in one ends the build.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import hfdetox

project = "hfdetox"
author = "the hfdetox authors"
release = version = hfdetox.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
source_suffix = {".md": "myst-nb"}
exclude_patterns = ["_ext"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"hfdetox {version}"
html_copy_source = False
html_show_copyright = False
# dashes only: quotes stay straight
smartquotes_action = "D"
html_show_sphinx = False

# their processes take these over: no network, and the figures of one thread
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds a cell; on a free core the longest takes about ten
nb_output_stderr = "remove"  # what libraries say of the machine

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# `x` in a docstring is code, not a cross reference
default_role = "literal"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
