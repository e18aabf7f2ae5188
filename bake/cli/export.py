"""`bake export`: the whole pipeline, its estimate, or a thin bake."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bake.cli.options import (
    ACCEPT_LICENCE,
    ENGINES,
    LAWS,
    ROUTES,
    SHARDS,
    SITES,
    add_finding,
    given_options,
)
from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "export",
        help="bake a direction into a checkpoint",
        description="Measure, decide, write and prove: one directory that plain transformers loads.",
    )
    command.set_defaults(run=run)
    option = _optional(command)
    option("model", metavar="MODEL", nargs="?", help="path, Hub id, or bake-demo")
    option(
        "--recipe", metavar="FILE", help="YAML with any of these options; options given here win"
    )
    option("--output", "-o", metavar="DIR", help="directory to write; must not exist")
    option("--overwrite", action="store_true", help="replace the output directory when done")
    option("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    option(
        "--estimate",
        action="store_true",
        help="say what it would cost (bytes, memory, passes, time) from headers alone; write nothing",
    )
    option = _optional(command.add_argument_group("the direction"))
    option(
        "--direction",
        action="append",
        metavar="FILE[:STRENGTH]",
        help="a direction: safetensors, .gguf, .npy, .npz, .pt, a rotalabs-steer folder, "
        "FILE:TENSOR[INDEX] of an autoencoder's decoder, or bake-demo; repeated, their sum, each with its "
        "strength",
    )
    option(
        "--orthogonalize",
        action="store_true",
        help="take from each of several directions what those before it hold",
    )
    option("--layer-offset", type=int, metavar="N", help="added to the layers the file names (0)")
    option(
        "--direction-site", choices=SITES[1:], help="where a file's direction was found (mlp_out)"
    )
    option("--keep-scale", action="store_true", help="α = m·‖v‖, the vector's own length, no law")
    option("--pairs", metavar="FILE", help="find it from contrast pairs: JSONL, CSV or a set")
    add_finding(command.add_argument_group("how --pairs become a direction"))
    option = _optional(command.add_argument_group("the strength"))
    option(
        "--multiplier",
        "-m",
        type=_multiplier,
        metavar="M",
        help="strength m; negative reverses (1.0). auto: a short sweep, and the largest shift that stays "
        "within bake sweep's bounds",
    )
    option("--law", choices=LAWS, help="how α follows from μ (inverse-sqrt-d: α = m·μ/√d)")
    option("--coefficients", metavar="L=α,…", help="explicit α per layer instead of a law")
    option("--prompts", metavar="FILE", help="calibration prompts: text, JSONL or a set (neutral)")
    option("--calibration", metavar="FILE", help="norms from bake calibrate instead of measuring")
    option("--statistic", choices=("mean", "median"), help="what μ is of the token norms (mean)")
    option = _optional(command.add_argument_group("the place"))
    option("--band", metavar="A:B", help="layers to push, per cent of the depth (40:90)")
    option("--site", choices=SITES, help="where the push is added (auto)")
    option(
        "--route",
        choices=ROUTES,
        help="how the bias comes to exist: already there, by a config flag, in another stock architecture "
        "that computes the same, or in extra layers, which auto never adds (auto)",
    )
    option("--slot", choices=("norm", "projection"), help="which bias takes it where both can")
    option(
        "--target",
        choices=ENGINES,
        help="only a route that is known to survive in this engine (default: any; it is announced where "
        "the chosen one survives)",
    )
    option("--convert-site", action="store_true", help="use a residual direction at an input site")
    option = _optional(command.add_argument_group("what is written"))
    option(
        "--shards",
        choices=SHARDS,
        help="base shards without a change: copy (cloned where the file system can; the default), or "
        "link to the base's files, also in the Hub's cache. A hard link is the same file twice: "
        "writing into one changes both. A symbolic link breaks when the base is moved or deleted. "
        "Patched shards are always copies",
    )
    option(
        "--thin",
        action="store_true",
        help="read no weights and write no base shards: only the new biases, index, config and card, "
        "not verified until the base's shards are beside them (needs --direction and --calibration)",
    )
    option(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="store the checkpoint in this dtype (the base's)",
    )
    option("--allow-rounding", action="store_true", help="accept a dtype too coarse for the push")
    option("--sweep", metavar="DIR", help="a bake sweep of this bake: its figures go into the card")
    option = _optional(command.add_argument_group("memory"))
    option("--device-map", choices=("auto",), help="spread weights over GPUs, CPU and disk")
    option(
        "--max-memory", metavar="SIZES", help="weights kept in memory: 600MB, or 0=20GB,cpu=60GB"
    )
    option = _optional(command.add_argument_group("the Hub"))
    option("--push-to-hub", metavar="REPO_ID", help="publish when proven (private)")
    option("--public", action="store_true", help="with --push-to-hub: make the repo public")
    option("--create-pr", action="store_true", help="with --push-to-hub: open a pull request")
    option(
        "--commit-message",
        metavar="TEXT",
        help="with --push-to-hub: title (Publish the baked model)",
    )
    option("--accept-licence", action="store_true", help=f"with --push-to-hub: {ACCEPT_LICENCE}")


def _optional(group: Any) -> Callable[..., Any]:
    """Return what adds an option; one that is not given stays out, so that a recipe file can supply it."""
    return partial(group.add_argument, default=argparse.SUPPRESS)


def _multiplier(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import report
    from bake.pipeline import estimate as cost
    from bake.pipeline import export as pipeline
    from bake.pipeline import recipe, thin

    given = given_options(parsed)
    file, only = given.pop("recipe", None), given.pop("estimate", False)
    wanted = (
        recipe.read_recipe(Path(file), given, without_output=only)
        if file
        else recipe.make_recipe(given, without_output=only)
    )
    if only:
        estimate = cost.estimate_cost(wanted)
        print_result(parsed, estimate.to_dict(), report.describe_estimate(estimate))
    elif wanted.thin:
        added = thin.export_thin(wanted)
        print_result(parsed, added.to_dict(), report.describe_thin(added))
    else:
        result = pipeline.export(wanted)
        print_result(parsed, result.to_dict(), report.describe_export(result))
    return 0
