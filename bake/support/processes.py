"""Several processes, as `accelerate launch` starts them: divide the texts, gather what was found.

In a process on its own every function here does nothing, and accelerate is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def count() -> int:
    """Return how many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def divide(items: Sequence[T]) -> list[T]:
    """Return this process's share: every n-th item, so that all get texts of every kind."""
    return list(items)[int(os.environ.get("RANK", "0")) :: count()]


def gather(value: Any) -> list[Any]:
    """Return every process's value, in the processes' order, in all of them."""
    if count() == 1:
        return [value]
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState()  # Joins the group that the launcher described, once.
    gathered: list[Any] = gather_object([value])
    return gathered
