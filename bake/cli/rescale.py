"""`bake rescale`: another strength, in place."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "rescale",
        help="give a baked directory another strength",
        description="New bytes for the slots, in place; nothing else moves. Not verified until bake verify "
        "has run again.",
    )
    command.set_defaults(run=run)
    command.add_argument("directory", metavar="DIR", help="what bake export wrote")
    command.add_argument(
        "--multiplier",
        "-m",
        type=float,
        required=True,
        metavar="M",
        help="the new strength m; negative reverses",
    )


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    found = api.rescale(**given_options(parsed))
    text = (
        f"{found.directory}: m = {found.before:g} is now m = {found.multiplier:g}; new bytes in "
        f"{', '.join(found.files)}\nnot verified at this strength: bake verify {found.directory}"
    )
    print_result(parsed, found.to_dict(), text)
    return 0
