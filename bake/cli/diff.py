"""`bake diff`: what differs between two checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "diff",
        help="which tensors, config keys and files differ, and by how much",
        description="Compare two checkpoints byte for byte; of those on the Hub, headers and the bytes of "
        "files whose hash differs.",
    )
    command.set_defaults(run=run)
    command.add_argument("base", metavar="BASE", help="path, Hub id, or bake-demo")
    command.add_argument("baked", metavar="BAKED", help="path or Hub id")
    command.add_argument("--base-revision", metavar="REV", help="of a base on the Hub")
    command.add_argument("--revision", metavar="REV", help="of a baked model on the Hub")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api
    from bake.lifecycle import diff as compare

    found = api.diff(**given_options(parsed))
    print_result(parsed, found.to_dict(), compare.describe(found))
    return 0
