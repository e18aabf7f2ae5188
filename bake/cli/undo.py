"""`bake undo`: the base, from the bake alone."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import given_options
from bake.cli.output import print_result

DESCRIPTION = (
    "Write the base that a bake was made from, with nothing but the bake: the tensors that it added are "
    "left out, those that it patched get their old values back, and so does config.json."
)


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "undo", help="write the base of a bake, from the bake alone", description=DESCRIPTION
    )
    command.set_defaults(run=run)
    command.add_argument(
        "model", metavar="DIR|REPO_ID", help="a baked directory, or its id on the Hub"
    )
    command.add_argument(
        "--output", "-o", required=True, metavar="DIR", help="directory to write; must not exist"
    )
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
