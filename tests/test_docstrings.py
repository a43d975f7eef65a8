"""Docstrings of exported names follow numpydoc."""

import inspect

import pytest
from numpydoc.validate import validate

import fastattn
import lowerbounds
import sketching

IGNORED = {
    "ES01": "an extended summary is for what the summary cannot say",
    "EX01": "test_layout asks for examples, and knows which classes need none",
    "GL07": "the house puts examples before references",
    "PR04": "several parameters may share one entry that refers to another call",
    "PR06": "types are words of the field: integer array, shape (n,)",
    "RT02": "what is returned has a name where the text refers to it",
    "RT03": "what is returned is said by the type where that is enough",
    "SA01": "names that belong together stand in one file",
}
# a method of a configuration says in one line what it does: its protocol has the rest
OF_METHODS = {"PR01", "RT01", "YD01"}


def names():
    for package in (fastattn, sketching, lowerbounds):
        for name in getattr(package, "__all__", []):
            value = getattr(package, name)
            yield f"{package.__name__}.{name}"
            if inspect.isclass(value):
                for member, method in vars(value).items():
                    if inspect.isfunction(method) and not member.startswith("_"):
                        yield f"{package.__name__}.{name}.{member}"


@pytest.mark.parametrize("name", sorted(names()))
def test_docstring_follows_numpydoc(name):
    ignored = set(IGNORED) | (OF_METHODS if name.count(".") > 1 else set())
    problems = [
        f"{code}: {text}"
        for code, text in validate(name)["errors"]
        if code not in ignored
    ]
    assert problems == []


def test_every_ignored_code_is_still_needed():
    met = {code for name in names() for code, _ in validate(name)["errors"]}
    assert set(IGNORED) <= met
