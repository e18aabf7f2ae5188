"""What is said while work goes on: messages of the logger "bake", stages, and progress bars.

A library speaks through `logging.getLogger("bake")` and prints nothing: the command line renders what
is logged (`bake.cli.messages`), a notebook or a service shows it as it has set up logging. Bars are tqdm's,
a notebook's own where there is one; where nobody sees a bar, a line is logged every so often.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from bake.support.processes import is_main
from bake.support.text import one_line, one_message

T = TypeVar("T")
LOGGER = logging.getLogger("bake")
EVERY = 30.0  # seconds between two lines where nobody sees a bar
STAGE = "stage"  # the attribute of a record that says how far the work is


def announce(message: str) -> None:
    """Log, as information, what the user should know while work goes on; of several processes once."""
    if is_main():
        LOGGER.info("%s", one_message(message))


def warn(message: str) -> None:
    """Log, as a warning, what the user should not overlook; of several processes once."""
    if is_main():
        LOGGER.warning("%s", one_message(message))


def say_where(message: str) -> None:
    """Log, as information, how far the work is."""
    if is_main():
        LOGGER.info("%s", one_message(message), extra={STAGE: True})


def track(items: Sequence[T], label: str) -> Iterable[T]:
    """Return `items` with a progress bar, or with a line every so often where nobody sees one.

    HF_HUB_DISABLE_PROGRESS_BARS is respected. Of several processes only the main one shows anything.
    """
    if not _shows_bars():
        return _with_lines(items, label)
    from tqdm.auto import tqdm

    bar: Iterable[T] = tqdm(items, desc=one_line(label), leave=False)
    return bar


@contextmanager
def track_bytes(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told bytes as they are done, from any thread, and moves a bar."""
    if not _shows_bars():
        yield _Lines(total, label).advance
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=one_line(label), unit="B", unit_scale=True, leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def _shows_bars() -> bool:
    """Tell whether somebody sees a bar: on a terminal or in a notebook, in the main process."""
    from huggingface_hub.utils import are_progress_bars_disabled

    if are_progress_bars_disabled() or not is_main():
        return False
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    """Tell whether this runs in a notebook's kernel."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


class _Lines:
    """Counts work, and logs how much is done every so often."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0
        self.said = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= EVERY and self.done < self.total:
            self.said = now
            say_where(f"{self.label}: {self.done / self.total:.0%}")


def _with_lines(items: Sequence[T], label: str) -> Iterator[T]:
    lines = _Lines(len(items), label)
    for item in items:
        yield item
        lines.advance(1)
