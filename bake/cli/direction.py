"""`bake direction MODEL --pairs FILE` finds a direction; `bake direction convert FILE` and `show FILE`.

A model that lies in a folder of one of these names is `./convert`.
"""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report
    from bake.directions import extract as extraction
    from bake.directions import separation
    from bake.strength import coefficients

    given = options_of(parsed)
    if given["layers"] is not None:
        given["layers"] = coefficients.parse_layers(given["layers"])
    direction = api.extract_direction(given.pop("model"), **given)
    found = separation.read_separation(direction)
    text = f"{report.describe_direction(direction, found)}\n\nwritten to {parsed.output}"
    print_result(parsed, {"output": parsed.output, **extraction.plain_values(direction)}, text)
    return 0


def run_convert(parsed: argparse.Namespace) -> int:
    """Run `bake direction convert`; return its exit code."""
    from bake import api

    converted = api.convert_direction(
        parsed.file,
        output=parsed.output,
        layer_offset=parsed.layer_offset,
        site=parsed.direction_site,
        push=parsed.push,
        model_hint=parsed.model_hint,
        layers=parsed.layers,
        model=parsed.model,
    )
    print_result(parsed, converted.to_dict(), converted.describe())
    return 0


def run_show(parsed: argparse.Namespace) -> int:
    """Run `bake direction show`; return its exit code."""
    from bake import api, report
    from bake.directions import extract as extraction
    from bake.directions import separation

    direction, reading = api.show_direction(
        parsed.file,
        model=parsed.model,
        compare=parsed.compare,
        tokens=parsed.tokens,
        layer_offset=parsed.layer_offset,
        site=parsed.direction_site,
        revision=parsed.revision,
    )
    found = separation.read_separation(direction)
    values = {**extraction.plain_values(direction), "reading": reading.to_dict()}
    print_result(parsed, values, report.describe_reading(direction, found, reading))
    return 0
