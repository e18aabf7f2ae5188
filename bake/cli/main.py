"""The command line: parse, run one of `bake.cli`, turn errors into one line and an exit code.

Results on stdout, progress and logs on stderr. Nothing heavy is imported until a command runs, so
`bake --help` is instant.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from bake.cli import (
    ablate,
    calibrate,
    completion,
    demo,
    detect,
    diff,
    direction,
    export,
    gguf,
    hear,
    inspect,
    play,
    prompts,
    publish,
    reproduce,
    rescale,
    space,
    sweep,
    tune,
    undo,
    verify,
)
from bake.cli.messages import render_messages
from bake.cli.output import discard_output, prepare_streams
from bake.cli.parser import parse, print_usage_error, usage_of
from bake.errors import BakeError, UsageError
from bake.options import others
from bake.options.ablate import ABLATE
from bake.options.declaration import Command
from bake.options.export import EXPORT
from bake.options.live import PLAY, SPACE, TRY
from bake.options.sweep import SWEEP
from bake.options.tune import TUNE
from bake.support.color import RED, paint
from bake.support.processes import is_main, rank

# In the order of `bake --help`.
COMMANDS: tuple[tuple[Command, Callable[[argparse.Namespace], int]], ...] = (
    (TRY, hear.run),
    (PLAY, play.run),
    (SPACE, space.run),
    (EXPORT, export.run),
    (ABLATE, ablate.run),
    (others.DIRECTION, direction.run),
    (others.CONVERT, direction.run_convert),
    (others.SHOW, direction.run_show),
    (others.CALIBRATE, calibrate.run),
    (others.INSPECT, inspect.run),
    (SWEEP, sweep.run),
    (TUNE, tune.run),
    (others.VERIFY, verify.run),
    (others.PUBLISH, publish.run),
    (others.PROMPT_SETS, prompts.run_list),
    (others.SETS, prompts.run_list),
    (others.SET, prompts.run_show),
    (others.DIFF, diff.run),
    (others.DETECT, detect.run),
    (others.GGUF, gguf.run),
    (others.REPRODUCE, reproduce.run),
    (others.RESCALE, rescale.run),
    (others.UNDO, undo.run),
    (others.DEMO, demo.run),
    (others.COMPLETION, completion.run),
)


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
    name, parsed = parse({command.name: command for command, _ in COMMANDS}, words)
    command, run = next(entry for entry in COMMANDS if entry[0].name == name)
    render_messages(quiet=parsed.quiet)
    try:
        return int(run(parsed))
    except UsageError as error:
        print_usage_error(f"bake {name}", f"usage: {usage_of(command)}", str(error))
        return error.exit_code
    except BakeError as error:
        who = "bake" if is_main() else f"bake, process {rank()}"
        print(f"{paint(f'{who}: error:', RED, sys.stderr)} {error}", file=sys.stderr)
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
