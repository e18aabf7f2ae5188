"""`bake ablate`: a direction taken out of a checkpoint."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report

    result = api.ablate(**options_of(parsed))
    print_result(parsed, result.to_dict(), report.describe_ablated(result))
    return 0
