"""The public functions and the declarations of their options: docstrings, and words for a misspelt keyword.

A docstring has one line a parameter, from the declaration of its option.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from bake.errors import UnknownOptionError
from bake.options.declaration import Command

F = TypeVar("F", bound=Callable[..., Any])


def documented(command: Command, **renamed: str) -> Callable[[F], F]:
    """Return a decorator that ends a docstring with what every parameter is, its default behind it.

    A keyword that is none of the function's raises UnknownOptionError, with the one that was meant.

    renamed: {option: the keyword's name in Python} where it has another one. The section is in the style
    that documentation generators read: "Args:", then a line `name: text` each.
    """
    explained = {
        option.parameter or renamed.get(option.name, option.name): option.explained
        for option in command.options
    }

    def decorate(function: F) -> F:
        parameters = inspect.signature(function).parameters

        @functools.wraps(function)
        def checked(*given: Any, **options: Any) -> Any:
            unknown = next((name for name in options if name not in parameters), None)
            if unknown is not None:
                near = get_close_matches(unknown, parameters, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(parameters)}"
                raise UnknownOptionError(f"{function.__name__} has no option {unknown!r}; {hint}")
            return function(*given, **options)

        lines = [f"    {name}: {explained[name]}" for name in parameters]
        checked.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *lines])
        return cast("F", checked)

    return decorate
