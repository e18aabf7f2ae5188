"""`bake publish`: a baked directory to the Hub."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api
    from bake.lifecycle.branches import parse_strengths

    options = options_of(parsed)
    strengths = options.pop("strengths")
    if strengths is not None:
        options["strengths"] = parse_strengths(strengths)
    publication = api.publish(**options)
    print_result(parsed, publication.to_dict(), publication.describe())
    return 0
