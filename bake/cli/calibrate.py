"""`bake calibrate`: the activation norms of every layer."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report

    norms = api.calibrate(**options_of(parsed))
    text = f"{report.describe_norms(norms)}\n\nwritten to {parsed.output}"
    print_result(parsed, {"output": parsed.output, **norms.to_dict()}, text)
    return 0
