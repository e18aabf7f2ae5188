"""`bake inspect`: what is exact in a model, or in every architecture."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.output import print_result, print_text


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "inspect",
        help="say which sites and routes are exact here, and why others are not",
        description="From the config alone: the places where a push could go, how the bias that takes it "
        "comes to exist, what that changes, and which engines read it. No weight is read.",
    )
    command.set_defaults(run=run)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL", nargs="?", help="path, Hub id, or bake-demo")
    which.add_argument(
        "--all",
        action="store_true",
        help="every architecture of the installed transformers, on its default configuration (minutes)",
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report

    if parsed.all:
        show = None if parsed.json else lambda found: print_text(report.describe_entries(found))
        entries = api.inspect_all(show)
        values = {"architectures": [entry.to_dict() for entry in entries]}
        print_result(parsed, values, "\n" + report.describe_totals(entries))
        return 0
    anatomy = api.inspect(parsed.model, revision=parsed.revision)
    print_result(parsed, anatomy.to_dict(), report.describe_anatomy(anatomy))
    return 0
