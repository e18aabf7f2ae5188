"""`bake undo`: the base, from the bake alone."""

from __future__ import annotations

import argparse
from typing import Any

from bake.commands.options import given_options
from bake.results import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser("undo", help="write the base of a bake, from the bake alone")
    command.set_defaults(run=run)
    command.add_argument("model", metavar="DIR|REPO_ID")
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="must not exist")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    found = api.undo(**given_options(parsed))
    text = (
        f"{found.output}: {found.base} with its {found.tensors} tensors; {found.dropped} of the bake's "
        f"dropped, {len(found.restored)} patched ones restored; "
        f"{len(found.whole_files)} weight files as they were, byte for byte"
    )
    print_result(parsed, found.to_dict(), text)
    return 0
