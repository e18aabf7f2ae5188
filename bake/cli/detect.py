"""`bake detect`: what was baked into a stranger's checkpoint."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code, which does not depend on what is found."""
    from bake import api

    found = api.detect(**options_of(parsed))
    print_result(parsed, found.to_dict(), found.describe())
    return 0
