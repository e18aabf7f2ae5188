"""`bake export`: the whole pipeline, its estimate, or a thin bake."""

from __future__ import annotations

import argparse
from pathlib import Path

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import report
    from bake.pipeline import estimate as cost
    from bake.pipeline import export as pipeline
    from bake.pipeline import recipe

    given = options_of(parsed)
    file, only = given.pop("recipe", None), given.pop("estimate", False)
    wanted = (
        recipe.read_recipe(Path(file), given, without_output=only)
        if file
        else recipe.make_recipe(given, without_output=only)
    )
    if only:
        estimate = cost.estimate_cost(wanted)
        print_result(parsed, estimate.to_dict(), report.describe_estimate(estimate))
    else:
        result = pipeline.export(wanted)
        print_result(parsed, result.to_dict(), report.describe_export(result))
    return 0
