"""Progress bars and announcements: on stderr, silent where the user has switched bars off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from bake.support.processes import is_main
from bake.support.text import one_line, one_message

T = TypeVar("T")


def track(items: Sequence[T], label: str) -> Iterable[T]:
    """Return `items` with a progress bar; HF_HUB_DISABLE_PROGRESS_BARS is respected.

    Of several processes only the main one shows bars and announces.
    """
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm

    hidden = are_progress_bars_disabled() or not sys.stderr.isatty() or not is_main()
    bar: Iterable[T] = tqdm(
        items, desc=one_line(label), disable=hidden, leave=False, file=sys.stderr
    )
    return bar


@contextmanager
def track_bytes(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told bytes as they are done, from any thread, and moves a bar."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm import tqdm

    hidden = are_progress_bars_disabled() or not sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=one_line(label),
        unit="B",
        unit_scale=True,
        disable=hidden,
        leave=False,
        file=sys.stderr,
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def announce(message: str) -> None:
    """Say something that the user should know while work goes on."""
    if is_main():
        print(f"bake: {one_message(message)}", file=sys.stderr, flush=True)
