"""`bake diff`: what differs between two checkpoints."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api
    from bake.lifecycle import diff as compare

    found = api.diff(**options_of(parsed))
    print_result(parsed, found.to_dict(), compare.describe(found))
    return 0
