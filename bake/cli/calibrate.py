"""`bake calibrate`: the activation norms of every layer."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import SITES, add_placement, given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "calibrate",
        help="measure the activation norm of every layer",
        description="Measure how long activations are, which decides how strongly a layer is pushed. bake "
        "export does it by itself; a saved result goes in with --calibration.",
    )
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument("--output", "-o", required=True, metavar="FILE", help="JSON file")
    command.add_argument(
        "--prompts", default="neutral", metavar="FILE", help="text, JSONL or a set (neutral)"
    )
    command.add_argument(
        "--site", choices=SITES[1:], default="mlp_out", help="where activations are read (mlp_out)"
    )
    command.add_argument(
        "--statistic",
        choices=("mean", "median"),
        default="mean",
        help="what μ is of the token norms (mean)",
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    add_placement(command)


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report

    norms = api.calibrate(**given_options(parsed))
    text = f"{report.describe_norms(norms)}\n\nwritten to {parsed.output}"
    print_result(parsed, {"output": parsed.output, **norms.to_dict()}, text)
    return 0
