"""Several processes, as `accelerate launch` and `torchrun` start them: divide work, gather findings.

Every process decides the same, from the same gathered values; only the main one writes and speaks. In a
process on its own every function here does nothing, and torch is not even imported.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


_shared = _alone = False


def share_model(shared: bool) -> None:
    """Say that the processes hold one model together: then all of them run every text."""
    global _shared
    _shared = shared


class Finished(SystemExit):
    """Raised where a process has done its share and the main one goes on alone; it ends with 0."""

    def __init__(self) -> None:
        super().__init__(0)


def count() -> int:
    """Return how many processes work together."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank() == 0


def divide(items: Sequence[T]) -> list[T]:
    """Return this process's share: every n-th item, so that all get texts of every kind.

    Where the processes hold one model together, all of it.
    """
    if _shared:
        return list(items)
    return list(items)[rank() :: count()]


def put_together(own: Sequence[T]) -> list[T]:
    """Gather what every process made of its share of `divide`, one value an item, in the items' order."""
    shares = gather(list(own))
    longest = max(map(len, shares))
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


def gather(value: Any) -> list[Any]:
    """Return every process's value, in the processes' order, in all of them; of one shared model one."""
    if _shared:
        return [agree(value)]
    return _gather(value)


def _gather(value: Any) -> list[Any]:
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    _group().all_gather_object(found, value)
    return found


def _group() -> Any:
    """Return torch.distributed with this process in the group that the launcher described.

    What is gathered here are objects on the CPU; a model that GPUs share needs their own backend too.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend)
        atexit.register(distributed.destroy_process_group)  # Without it gloo aborts at the end.
    return distributed


def agree(value: T) -> T:
    """Return the main process's value: what has no single right answer to the last bit is decided there."""
    if count() == 1:
        return value
    agreed = [value]
    _group().broadcast_object_list(agreed, src=0)
    return agreed[0]


def on_main(action: Callable[[], T]) -> T:
    """Return, in every process, what an action gives in the main one; or raise what it raises there."""
    if count() == 1:
        return action()
    value, failure = None, None
    if is_main():
        try:
            value = action()
        except Exception as error:  # It is raised again below, in all of them.
            failure = error
    found, raised = agree((value, failure))
    if raised is not None:
        raise raised
    made: Any = found
    given: T = made
    return given


def leave_to_main() -> None:
    """Wait for the others; then end every process but the main one, which goes on alone."""
    global _alone
    _gather(None)
    if not is_main():
        raise Finished
    _alone = True
