"""What the logger "bake" says, on stderr: one line a message, with a time where nobody watches."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress

from bake.support.color import DIM, YELLOW, paint
from bake.support.progress import LOGGER, STAGE


class Renderer(logging.Handler):
    """Prints a record as a line on stderr: `bake: …`, or a stage as `3/9 calibrating`.

    On a terminal stages are dim; elsewhere, as under nohup, the time stands before them.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a stderr that is gone is no reason to stop."""
        if sys.stderr is None:
            return
        text = record.getMessage()
        if getattr(record, STAGE, False):
            seen = sys.stderr.isatty()
            line = paint(text, DIM, sys.stderr) if seen else f"{time.strftime('%H:%M:%S')} {text}"
        elif record.levelno >= logging.WARNING:
            line = f"{paint('bake: warning:', YELLOW, sys.stderr)} {text}"
        else:
            line = f"bake: {text}"
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def render_messages(*, quiet: bool = False) -> None:
    """Let the command line show what is logged; quiet: warnings only."""
    if not any(isinstance(handler, Renderer) for handler in LOGGER.handlers):
        LOGGER.addHandler(Renderer())
        LOGGER.propagate = False
    LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
