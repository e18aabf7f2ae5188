"""`bake try`: prompts side by side, or a line to type at."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bake.cli.output import print_result
from bake.cli.parser import options_of
from bake.errors import BakeError

if TYPE_CHECKING:
    from rich.console import Console

    from bake.live.hear import Session


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake.api.hearing import session_options
    from bake.live.hear import divide_words, hear, open_session
    from bake.report.voices import show_answers

    options = options_of(parsed)
    words = [options.pop("model", ""), *options.pop("texts", ())]
    options["model"], texts = divide_words(words, options.get("recipe"))
    with session_options(options) as (model, given, own):
        if parsed.json:
            said = list(texts) or [line for line in read_lines(typed=False) if line]
            print_result(parsed, hear(model, said, given, **own).to_dict(), "")
            return 0
        session = open_session(model, given, **own)
        console = open_console()
        if not texts:
            return converse(session, console)
        print(session.describe(), flush=True)
        for text in texts:
            show_answers(console, text, session.talk.ask(text))
    return 0


def open_console() -> Console:
    """Return where answers are shown: stdout, in the width that it has."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def converse(session: Session, console: Console) -> int:
    """Read prompts and commands until there are no more; Ctrl-C stops an answer."""
    from bake.report.voices import show_answers

    typed = sys.stdin.isatty()
    print(session.describe() + ("; /help says what else can be typed" if typed else ""), flush=True)
    for line in read_lines(typed):
        try:
            if line == "/quit":
                break
            if line.startswith("/"):
                print(_obey(session, line), flush=True)
            elif line:
                shown = None if typed else line
                with contextlib.suppress(KeyboardInterrupt):
                    show_answers(console, shown, session.talk.ask(line))
        except BakeError as error:
            print(f"bake: {error}", file=sys.stderr)
    return 0


def read_lines(typed: bool) -> Iterator[str]:
    """Yield lines from stdin, with a prompt and the arrow keys where somebody types them."""
    if not typed:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines with it.
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def _obey(session: Session, line: str) -> str:
    if session.knobs is not None:
        return session.knobs.obey(line)
    if line == "/reset":
        session.talk.reset()
        return "a new conversation"
    raise BakeError(
        "a bake is heard as it is and has /reset and /quit only; bake try MODEL --direction "
        "DIR/direction.safetensors turns its direction"
    )
