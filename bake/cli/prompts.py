"""`bake prompts list` and `bake prompts show`: the texts that ship."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "prompts",
        help="list or show the prompt sets and contrast pairs",
        description="The sets that ship: their names can be given to --prompts, --pairs, "
        "--held-out, --openings and --neutral.",
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every set that ships: name, kind, count, purpose")
    listing.set_defaults(run=_run_list)
    showing = actions.add_parser("show", help="print a set: texts, or pairs as two lines + and -")
    showing.set_defaults(run=_run_show)
    showing.add_argument("name", metavar="NAME", help="a name from bake prompts list")
    showing.add_argument("--limit", type=int, metavar="N", help="only the first N (all)")
    for action in (listing, showing):
        # Suppressed, or the default here would undo a --json that was given before the action.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
        )


def _run_list(parsed: argparse.Namespace) -> int:
    from bake import report
    from bake.texts import shipped as prompt_sets

    sets = prompt_sets.list_sets()
    print_result(parsed, {"sets": [found.to_dict() for found in sets]}, report.describe_sets(sets))
    return 0


def _run_show(parsed: argparse.Namespace) -> int:
    from bake import report
    from bake.texts import shipped as prompt_sets

    shown = prompt_sets.show_set(parsed.name, parsed.limit)
    print_result(parsed, shown.to_dict(), report.describe_set(shown))
    return 0
