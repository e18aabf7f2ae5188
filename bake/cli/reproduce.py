"""`bake reproduce`: a bake built again from its record."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "reproduce",
        help="build a bake again from its bake.json and compare every file",
        description="Build a bake again, from its bake.json, its direction and its base, in a temporary "
        "directory, and compare every file's bytes. Exit code 3 where one differs.",
    )
    command.set_defaults(run=run)
    command.add_argument(
        "model", metavar="DIR|REPO_ID", help="a baked directory, or its id on the Hub"
    )
    command.add_argument("--base", metavar="MODEL", help="the base (as bake.json names it)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    command.add_argument(
        "--calibrate",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="measure the norms again, on FILE or the set that the bake names, and say how they differ",
    )


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api
    from bake.lifecycle import reproduce as reproduction

    found = api.reproduce(**given_options(parsed))
    print_result(parsed, found.to_dict(), reproduction.describe(found))
    found.raise_if_different()
    return 0
