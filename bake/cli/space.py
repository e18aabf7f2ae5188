"""`bake space`: the folder of a Hugging Face Space."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    written = api.space(**options_of(parsed))
    print_result(parsed, written.to_dict(), written.describe())
    return 0
