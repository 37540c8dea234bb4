"""The documentation site, which `make docs` builds."""

import importlib.metadata
import os

project = "lightning_calibft"
author = "The lightning_calibft authors"
copyright = f"2026, {author}"
release = importlib.metadata.version("lightning-calibft")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_execution_timeout = 900  # seconds a cell; the longest one trains an ImageNet network

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References within this package must resolve everywhere. Those to other projects become links on Read the Docs, where
# their inventories can be downloaded. A build elsewhere does not ask for them.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!lightning_calibft\b).*"),
    ("py:class", r"lightning_calibft\.checkpoint\.load\.(Module|Pretrained)"),  # type variables
]
if os.environ.get("READTHEDOCS"):
    intersphinx_timeout = 30
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable/", None),
        "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable/", None),
        "timm": ("https://huggingface.co/docs/timm/main/en/", None),
        "transformers": ("https://huggingface.co/docs/transformers/main/en/", None),
    }

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"  # copy the code of an example without its prompts and its output
