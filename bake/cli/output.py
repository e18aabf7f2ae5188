"""How a command answers: one JSON object with `--json`, text for people without, from one process.

And what happens where nobody listens: a closed stream, a reader that has gone, a full disk.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from typing import Any

from bake.errors import OutputError
from bake.support.processes import is_main
from bake.support.text import without_controls
from bake.support.timing import peak_memory

STARTED = time.monotonic()


def print_result(parsed: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    """Print a command's result on stdout; of several processes only the main one does.

    With `--json` it has what it cost, which is the whole where the command knows no stages.

    Raises OutputError where stdout is a file that cannot be written, and BrokenPipeError.
    """
    if not is_main():
        return
    measured = {"timings": {"total": time.monotonic() - STARTED}, "peak_memory": peak_memory()}
    print_text(json.dumps({**measured, **values}, indent=2) if parsed.json else text)


def print_text(text: str) -> None:
    """Print a result, or a part of one that is there already, on stdout. Raises as `print_result`."""
    if not is_main():
        return
    try:
        print(without_controls(text), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise OutputError(f"the result cannot be printed: {error.strerror or error}") from None


def prepare_streams() -> None:
    """Make stdout and stderr take whatever is printed.

    A closed one becomes an in-memory sink, so that nothing goes to the other one instead; an encoding
    that lacks a letter, as ASCII lacks α, prints a question mark instead of failing after the work.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def discard_output() -> None:
    """Forget what is still buffered for stdout, which Python would try to write again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
