"""`bake tune`: where to push, by what moves most at one cost."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of
from bake.options.tune import TUNE


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    options = options_of(parsed)
    for option in TUNE.options:
        if option.many:
            options[str(option.parameter)] = options.pop(option.name)
    found = api.tune(**options)
    print_result(parsed, found.to_dict(), found.describe())
    return 0
