"""`bake inspect`: what is exact in a model, or in every architecture."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result, print_text


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
