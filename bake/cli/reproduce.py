"""`bake reproduce`: a bake built again from its record."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api
    from bake.lifecycle import reproduce as reproduction

    found = api.reproduce(**options_of(parsed))
    print_result(parsed, found.to_dict(), reproduction.describe(found))
    found.raise_if_different()
    return 0
