"""`bake verify`: the proof again, or a server asked whether it serves the bake."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import add_placement, given_options
from bake.cli.output import print_result
from bake.errors import BakeError, EquivalenceError


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "verify",
        help="prove a baked directory or a published bake again, or ask a server whether it serves it",
        description="Prove a baked directory, or a published bake by its id, again. With --endpoint: ask "
        "an OpenAI-compatible server to continue the canary of the directory's bake.json, and say whether "
        "it serves the bake or the base. Exit code 3 where it is not the bake.",
    )
    command.set_defaults(run=run)
    command.add_argument(
        "directory",
        metavar="DIR|REPO_ID",
        nargs="?",
        default=".",
        help="a baked directory, or its id on the Hub (.)",
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    command.add_argument(
        "--base", metavar="MODEL", help="the base (default: as bake.json names it)"
    )
    command.add_argument("--endpoint", metavar="URL", help="a server, as http://localhost:8000/v1")
    command.add_argument("--model", metavar="NAME", help="what the server calls the model")
    add_placement(command)


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report

    if parsed.endpoint:
        checked = api.verify_endpoint(
            parsed.endpoint, parsed.model, directory=parsed.directory, revision=parsed.revision
        )
        print_result(parsed, checked.to_dict(), checked.describe())
        return 0 if checked.verdict == "baked" else EquivalenceError.exit_code
    if parsed.model:
        raise BakeError("--model is what a server calls the model; it goes with --endpoint URL")
    options = given_options(parsed)
    del options["endpoint"], options["model"]
    verification = api.verify(**options)
    equivalence = verification.equivalence
    print_result(parsed, verification.to_dict(), report.describe_equivalence(equivalence))
    equivalence.raise_if_failed()
    return 0
