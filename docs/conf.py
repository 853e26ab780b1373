"""Configuration of the documentation site; ``make docs`` builds it without a network."""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kfac_opt  # noqa: E402

project = "kfac_opt"
author = "The kfac_opt authors"
project_copyright = "2026, " + author
release = version = kfac_opt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "gallery/*.md5"]
html_theme = "furo"  # search and a dark mode
html_title = f"kfac_opt {release}"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the docstrings say what each argument is
autodoc_member_order = "bysource"
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_use_rtype = False
doctest_global_setup = """
import torch
from torch import nn
from kfac_opt import KFAC, KFACVI, Posterior
torch.manual_seed(0)
"""

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "image_scrapers": ("matplotlib",),
    "plot_gallery": os.environ.get("KFAC_OPT_GALLERY", "run") == "run",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
    "within_subsection_order": "FileNameSortKey",
    "min_reported_time": 60,
}
# An example says what it has to say by printing and drawing; tools below it may warn of their own affairs.
warnings.filterwarnings("ignore", category=DeprecationWarning)
