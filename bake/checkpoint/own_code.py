"""Code that a checkpoint of others brings or names: bake runs none of it and hands none of it on.

`auto_map`, in config.json and in the files of tokenizer and processor, names classes in `.py` files beside
them, which transformers runs where it is told `trust_remote_code`. An implementation of attention or
experts with a slash in its name ("kernels-community/flash-attn2") is fetched from the Hub and run without
being told. What was proven of a bake is transformers' own class, without either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

AUTO_MAP = "auto_map"
CODE_FILES = (
    *("*.py", "*.pyc", "*.pyd", "*.so", "*.dll", "*.dylib"),
    *("*.c", "*.cc", "*.cpp", "*.cu", "*.cuh", "*.h", "*.sh", "*.ipynb"),
)
#: Implementations that torch and transformers have themselves; None leaves the choice to transformers.
STOCK_ATTENTION = (None, "eager", "sdpa")
STOCK_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
_IMPLEMENTATIONS = {
    *("attn_implementation", "_attn_implementation"),
    *("experts_implementation", "_experts_implementation"),
}


def is_code(name: str) -> bool:
    """Tell whether a file, relative to its checkpoint, holds code."""
    return any(fnmatchcase(name.rpartition("/")[2].lower(), pattern) for pattern in CODE_FILES)


def find_code_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what names code in a JSON object, at any depth."""
    for key, value in values.items():
        if key == AUTO_MAP or (key in _IMPLEMENTATIONS and _names_kernel(value)):
            yield prefix + key, value
        elif isinstance(value, Mapping) and "." not in key:
            yield from find_code_keys(value, f"{prefix}{key}.")


def describe_reference(reference: Any) -> str:
    """Say where a class of an `auto_map` lies: "XForCausalLM in modeling_x.py", of which repository."""
    if isinstance(reference, list):
        reference = next((entry for entry in reversed(reference) if entry), None)
    repository, _, inside = str(reference).rpartition("--")
    module, _, name = inside.rpartition(".")
    where = f"{name} in {module}.py" if module else name
    return f"{where} of {repository}" if repository else where


def _names_kernel(value: Any) -> bool:
    return "/" in str(value)
