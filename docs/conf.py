"""Settings of the documentation: ``make docs`` builds it into ``docs/_build``."""

import inspect
import math
import sys
from pathlib import Path
from typing import Any

import fastattn
from fastattn.costs.policy import POLICY

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fastattn"
author = copyright = "The fastattn developers"
version = release = fastattn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "results",
    # formulas are drawn without a network
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery", "**/sg_execution_times.rst"]
templates_path = ["_templates"]
nitpicky = True

html_theme = "furo"
html_title = f"fastattn {version}"
html_static_path = ["_static"]
html_css_files = ["fastattn.css"]

myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
# rows from which heads are planned at all, with a causal mask, and with clusters, and
# from which int8/bfloat16 matmul is tried
myst_substitutions = {
    "planned": math.isqrt(POLICY.auto.few_logits),
    "planned_causal": math.isqrt(2 * POLICY.auto.few_logits),
    "clustered": math.isqrt(POLICY.multipole.few_logits),
    "rounded": math.isqrt(POLICY.auto.fewest_logits),
}
myst_heading_anchors = 2
# options and quotes in tables stay as they are typed
smartquotes = False
# `text` is code, as in the docstrings
default_role = "py:obj"

# docstrings say the types, in words
autodoc_typehints = "none"
autosummary_generate = True
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    # what a script prints depends on the library, not on the script alone
    "run_stale_examples": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "matplotlib_animations": False,
    "write_computation_times": False,
}


# parameters of methods that only the library calls
ASKED_OF_RECIPES = {"head", "request", "_request"}


def leave_out(
    _app: Any, _kind: str, _name: str, member: Any, skip: bool, _options: Any
) -> bool | None:
    """Leave out what is not ours, and what is not for users."""
    function = getattr(member, "fget", member)
    home = getattr(function, "__module__", None) or ""
    if home.partition(".")[0] not in ("fastattn", "sketching", "lowerbounds"):
        return True
    if inspect.isfunction(function):
        arguments = list(inspect.signature(function).parameters)[1:2]
        return skip or not ASKED_OF_RECIPES.isdisjoint(arguments)
    return skip


def setup(app: Any) -> None:
    """Connect the handler of autodoc."""
    app.connect("autodoc-skip-member", leave_out)
