"""`bake publish`: a baked directory to the Hub."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import ACCEPT_LICENCE, given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "publish",
        help="publish a baked directory to the Hub",
        description="One commit with everything, compared after it arrived. Base shards without a change "
        "are copied on the Hub where the base lies there. After a break, run it again: nothing is sent "
        "twice.",
    )
    command.set_defaults(run=run)
    command.add_argument("directory", metavar="DIR", help="what bake export wrote")
    command.add_argument("repo_id", metavar="REPO_ID", help="such as your-name/your-model")
    command.add_argument("--public", action="store_true", help="make the repo public (private)")
    command.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to, made where there is none (main)"
    )
    command.add_argument(
        "--create-pr", action="store_true", help="open a pull request instead of committing"
    )
    command.add_argument(
        "--commit-message", metavar="TEXT", help="the commit's title (Publish the baked model)"
    )
    command.add_argument("--accept-licence", action="store_true", help=ACCEPT_LICENCE)
    command.add_argument(
        "--verify-remote",
        action="store_true",
        help="download what was published and prove it, loaded by its id in a fresh process; a thin bake's "
        "card then says so, in a second commit",
    )
    command.add_argument(
        "--strengths",
        metavar="M,…",
        help="also put these multipliers on branches (0.5,1.5: m0.5 and m1.5; below zero written "
        "--strengths=-1,1), each proven before it is sent; only the slots' shard is sent for each",
    )
    command.add_argument(
        "--base",
        metavar="MODEL",
        help="the base, for these proofs (default: as bake.json names it)",
    )


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api
    from bake.lifecycle.branches import parse_strengths

    options = given_options(parsed)
    strengths = options.pop("strengths")
    if strengths is not None:
        options["strengths"] = parse_strengths(strengths)
    publication = api.publish(**options)
    print_result(parsed, publication.to_dict(), publication.describe())
    return 0
