"""`bake prompts list` and `bake prompts show`: the texts that ship."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result


def run_list(parsed: argparse.Namespace) -> int:
    """Run `bake prompts list`; return its exit code."""
    from bake import report
    from bake.texts import shipped as prompt_sets

    sets = prompt_sets.list_sets()
    print_result(parsed, {"sets": [found.to_dict() for found in sets]}, report.describe_sets(sets))
    return 0


def run_show(parsed: argparse.Namespace) -> int:
    """Run `bake prompts show`; return its exit code."""
    from bake import report
    from bake.texts import shipped as prompt_sets

    shown = prompt_sets.show_set(parsed.name, parsed.limit)
    print_result(parsed, shown.to_dict(), report.describe_set(shown))
    return 0
