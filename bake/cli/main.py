"""The command line: parse, run one of `bake.cli`, turn errors into one line and an exit code.

Results on stdout, progress and logs on stderr. Nothing heavy is imported until a command runs, so
`bake --help` is instant.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from bake.cli import (
    calibrate,
    demo,
    diff,
    direction,
    export,
    given_direction,
    inspect,
    prompts,
    publish,
    reproduce,
    rescale,
    sweep,
    undo,
    verify,
)
from bake.cli.output import discard_output, prepare_streams
from bake.errors import BakeError
from bake.version import __version__

DESCRIPTION = "Turn a steering direction into ordinary weights: plain transformers, no hooks."
EPILOG = (
    "bake COMMAND --help says more. Begin with bake demo, which downloads nothing. Exit codes: 0 done, 1 "
    "an error that one line names, 2 usage, 3 not equivalent."
)
COMMANDS = (
    export,
    direction,
    calibrate,
    inspect,
    sweep,
    verify,
    publish,
    prompts,
    diff,
    reproduce,
    rescale,
    undo,
    demo,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(prog="bake", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"bake {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 a known error, 2 usage, 3 not equivalent.

    130 where it was interrupted, 143 where it was told to end, 141 where whoever read the output has
    gone, as in `bake … | head`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    interrupt_when_ended()
    try:
        try:
            return _run(words)
        finally:
            sys.stdout.flush()  # Here, because Python's own flush at exit has a complaint of its own.
    except BrokenPipeError:
        discard_output()
        return 141


def _run(words: Sequence[str]) -> int:
    """Parse and run; known errors become one line."""
    try:
        if given_direction.is_command(words):
            parsed = given_direction.build_parser(words[1]).parse_args(words[2:])
        else:
            parsed = build_parser().parse_args(words)
        return int(parsed.run(parsed))
    except BakeError as error:
        print(f"bake: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        print("bake: interrupted; no output is half written", file=sys.stderr)
        return 128 + (interrupt.signal if isinstance(interrupt, Ended) else signal.SIGINT)


class Ended(KeyboardInterrupt):
    """A request to end, as `kill` and a closed terminal send it: everything is cleaned up as for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


def interrupt_when_ended() -> None:
    """Make SIGTERM and SIGHUP interrupt this process, where they are not ignored as under `nohup`."""

    def end(number: int, _: object) -> None:
        raise Ended(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)


if __name__ == "__main__":
    sys.exit(main())
