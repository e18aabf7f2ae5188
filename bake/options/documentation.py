"""Docstrings of the public functions: one line a parameter, from the declaration of its option."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from bake.options.declaration import Command

F = TypeVar("F", bound=Callable[..., Any])


def documented(command: Command, **renamed: str) -> Callable[[F], F]:
    """Return a decorator that ends a docstring with what every parameter is, its default behind it.

    renamed: {option: the keyword's name in Python} where it has another one. The section is in the style
    that documentation generators read: "Args:", then a line `name: text` each.
    """
    explained = {
        option.parameter or renamed.get(option.name, option.name): option.explained
        for option in command.options
    }

    def decorate(function: F) -> F:
        lines = [
            f"    {name}: {explained[name]}" for name in inspect.signature(function).parameters
        ]
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines])
        return function

    return decorate
