"""Validation of the options that all calls have in common."""

from typing import Any

import numpy as np

from fastattn.planning.auto import Auto
from fastattn.problem.plan import Method
from sketching._lib.random import RandomSource, as_generator
from sketching._lib.validation import check_choice, check_number

GUARANTEES = ("sampled", "proven")


def check_options(
    tol: Any, method: Any, guarantee: Any, rng: RandomSource
) -> tuple[float, Method, np.random.Generator]:
    """Check tol, method, guarantee and rng; fill in defaults."""
    tol = check_number("tol", tol, above=0)
    check_choice("guarantee", guarantee, GUARANTEES)
    method = Auto() if method is None else method
    if isinstance(method, type) or not hasattr(method, "solve"):
        raise TypeError(
            "method: expected a method object such as Auto(), Exact() or "
            f"Polynomial(), got {method!r}"
        )
    return tol, method, as_generator(rng)


def check_served(function: Any, method: Any) -> None:
    """Raise what a function that is dispatched by method raises for any other one."""
    if function.dispatch(type(method)) is function.dispatch(object):
        function(method)


def check_pairwise(method: Any) -> None:
    """Raise ``TypeError`` for methods of tensor attention."""
    if getattr(method, "needs_tuples", False):
        raise TypeError(
            f"method: {method} expected tuples of keys and of values (tensor "
            "attention), got arrays"
        )
