"""For mkdocstrings: docstrings as they are at run time, with the declarations of options added."""

import inspect
from typing import Any

import griffe


class RuntimeDocstrings(griffe.Extension):
    """Replaces the docstring of every function of `bake.api` by the one that `help()` shows."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Called by griffe for each function that it reads."""
        if func.path.startswith("bake.api.") and not func.name.startswith("_"):
            text = inspect.getdoc(griffe.dynamic_import(func.path))
            parser = func.docstring.parser if func.docstring else "google"
            func.docstring = griffe.Docstring(text or "", parent=func, parser=parser)
