"""`bake completion SHELL`: the script that completes commands, options and their values."""

from __future__ import annotations

import argparse

from bake.cli.output import print_text
from bake.cli.parser import make_overview

# What a shell completes with the names of files, by an option's metavar.
FILES = ("FILE", "MODEL", "BASE", "BAKED", "FILE[:STRENGTH]")
DIRECTORIES = ("DIR", "DIR|REPO_ID")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import shtab

    from bake.cli.main import COMMANDS

    parser = make_overview({command.name: command for command, _ in COMMANDS}, whole=True)
    for action in _actions(parser):
        if action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print_text(shtab.complete(parser, parsed.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return every option of a parser and of those below it."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found += _actions(below)
    return found
