"""`bake sweep`: what a direction does at each strength, and what it costs."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of
from bake.options.sweep import SWEEP


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake.sweeps.description import describe
    from bake.sweeps.options import TrialOptions
    from bake.sweeps.run import sweep

    options = options_of(parsed)
    for option in SWEEP.options:
        if option.many:
            options[option.parameter or option.name] = tuple(options.pop(option.name))
    found = sweep(TrialOptions(**options))
    print_result(parsed, found.to_dict(), describe(found))
    return 0
