"""Seconds per stage and the peak memory of the process: what `--json` reports beside the result."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bake.support.progress import say_where

# What the user reads when a stage begins; those that take no time are timed and not told.
STAGES = {
    "checkpoint": "reading the checkpoint",
    "anatomy": "examining the architecture",
    "load": "loading the model",
    "direction": "finding the direction",
    "layer": "choosing the layer",
    "calibrate": "calibrating",
    "strength": "choosing the strength",
    "write": "writing the checkpoint",
    "prove": "proving it",
    "hash": "hashing",
    "publish": "publishing",
    "sweep": "measuring every strength",
    "by layer": "measuring layer by layer",
    "tune": "comparing candidates",
    "report": "writing the report",
}


class Stopwatch:
    """Collects the wall-clock seconds of named stages, in the order in which they ran.

    expected: the stages that are to come, of STAGES; each is told when it begins, "3/9 calibrating".
    """

    def __init__(self, expected: Sequence[str] = ()) -> None:
        self.seconds: dict[str, float] = {}
        self.expected = tuple(expected)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block; a name that comes twice is added up, and told once."""
        if name in self.expected and name not in self.seconds:
            place = self.expected.index(name) + 1
            say_where(f"{place}/{len(self.expected)} {STAGES[name]}")
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory() -> int:
    """Return the largest resident size that this process or one of its children has had, in bytes.

    Memory-mapped files count while the kernel keeps their pages.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    users = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(user).ru_maxrss for user in users) * unit
