"""Errors cross process borders with their message, and the tree in the docstring is the tree of the classes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from transplant_ray import errors
from transplant_ray.errors import TransplantError

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, TransplantError)]


def drawn_tree() -> dict[str, str | None]:
    """Class → parent, read from the drawing."""
    path: list[str] = []
    parents: dict[str, str | None] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^    ((?:│   |    )*(?:[├└]── )?)([A-Z]\w+)", line):
            depth = len(found[1]) // 4
            parents[found[2]] = path[depth - 1] if depth else None
            path[depth:] = [found[2]]
    return parents


def test_the_tree_that_is_drawn_is_the_tree_of_the_classes() -> None:
    assert drawn_tree() == {each.__name__: None if each is TransplantError else each.__bases__[0].__name__ for each in CLASSES}


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_survives_pickling_with_its_message(error: type[TransplantError]) -> None:
    message = "model.layers.0: source is (96, 256), target is (128, 256).\nChoose two models of one family."
    again = pickle.loads(pickle.dumps(error(message)))
    assert type(again) is error
    assert str(again) == message


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_says_what_it_means_and_is_one_a_user_can_act_on(error: type[TransplantError]) -> None:
    assert (error.__doc__ or "").endswith(".")
    assert issubclass(error, TransplantError)
    assert not issubclass(error, OSError | ValueError | RuntimeError)  # or a handler for those would swallow it
