"""`bake direction MODEL --pairs FILE`: a direction from contrast pairs."""

from __future__ import annotations

import argparse
from typing import Any

from bake.cli.options import SITES, add_finding, add_placement, given_options
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "direction",
        help="find a direction from contrast pairs, convert one, or show what one says",
        description="Find one unit direction a layer in the activations that tell the pairs' texts apart, "
        "and say how well it separates pairs that it was not found from.",
        epilog="bake direction convert FILE --output FILE writes one in another tool's format, bake "
        "direction show FILE --model MODEL shows what one says; see their --help",
    )
    command.set_defaults(run=run)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument(
        "--pairs",
        required=True,
        metavar="FILE",
        help="JSONL, CSV or a set (see bake prompts list)",
    )
    command.add_argument("--output", "-o", required=True, metavar="FILE", help="safetensors file")
    add_finding(command)
    command.add_argument(
        "--layers", metavar="LIST", help="layers to find it in, such as 3,5-8 (all of them)"
    )
    command.add_argument(
        "--neutral",
        default="neutral",
        metavar="FILE",
        help="prompts optimize leaves alone (neutral)",
    )
    command.add_argument(
        "--site", choices=SITES[1:], default="mlp_out", help="where activations are read (mlp_out)"
    )
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    add_placement(command)


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report
    from bake.directions import extract as extraction
    from bake.directions import separation
    from bake.strength import coefficients

    given = given_options(parsed)
    if given["layers"] is not None:
        given["layers"] = coefficients.parse_layers(given["layers"])
    direction = api.extract_direction(given.pop("model"), **given)
    found = separation.read_separation(direction)
    text = f"{report.describe_direction(direction, found)}\n\nwritten to {parsed.output}"
    print_result(parsed, {"output": parsed.output, **extraction.plain_values(direction)}, text)
    return 0
