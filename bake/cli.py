"""The commands: parse, call, print. Results on stdout, progress and logs on stderr.

Nothing heavy is imported until a command runs, so `bake --help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bake import __version__, direction_commands
from bake.errors import BakeError
from bake.results import print_result as _print

DESCRIPTION = "Turn a steering direction into ordinary weights: plain transformers, no hooks."
# Kept here as text: importing the modules that own these would be cheap, importing torch would not.
SITES = ("auto", "mlp_out", "attn_out", "attn_in", "mlp_in")
ROUTES = ("auto", "native", "flag", "host", "insert")
SHARDS = ("copy", "hardlink", "symlink")
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "mlx")
LAWS = ("inverse-sqrt-d", "sqrt-d", "norm", "flat")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = argparse.ArgumentParser(prog="bake", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"bake {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_export(commands)
    _add_direction(commands)
    _add_calibrate(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_publish(commands)
    _add_prompts(commands)
    _add_demo(commands)
    for name in ("direction", "calibrate", "verify"):
        _add_placement(commands.choices[name])
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 a known error, 2 usage, 3 not equivalent."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if direction_commands.is_command(words):
        parsed = direction_commands.build_parser(words[1]).parse_args(words[2:])
    else:
        parsed = build_parser().parse_args(words)
    try:
        return int(parsed.run(parsed))
    except BakeError as error:
        print(f"bake: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bake: interrupted; nothing was left behind", file=sys.stderr)
        return 130


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="bake a direction into a checkpoint",
        description="Measure, decide, write and prove: one directory that plain transformers loads.",
    )
    command.set_defaults(run=_run_export)
    # Options that are not given stay out of the namespace, so that a recipe file can supply them.
    option = lambda *names, **kwargs: command.add_argument(  # noqa: E731
        *names, default=argparse.SUPPRESS, **kwargs
    )
    option("model", metavar="MODEL", nargs="?", help="path, Hub id, or bake-demo")
    option(
        "--recipe", metavar="FILE", help="YAML with any of these options; options given here win"
    )
    option(
        "--direction",
        metavar="FILE",
        help="a direction: safetensors, .gguf, .npy, .npz, .pt, a rotalabs-steer folder, "
        "FILE:TENSOR[INDEX] of an autoencoder's decoder, or bake-demo",
    )
    option("--layer-offset", type=int, metavar="N", help="added to the layers the file names (0)")
    option(
        "--direction-site", choices=SITES[1:], help="where a file's direction was found (mlp_out)"
    )
    option("--keep-scale", action="store_true", help="α = m·‖v‖, the vector's own length, no law")
    option("--pairs", metavar="FILE", help="find the direction from contrast pairs: JSONL or a set")
    option("--output", "-o", metavar="DIR", help="directory to write; must not exist")
    option("--overwrite", action="store_true", help="replace the output directory when done")
    option("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
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
        "--multiplier", "-m", type=float, metavar="M", help="strength m; negative reverses (1.0)"
    )
    option("--band", metavar="A:B", help="layers to push, per cent of the depth (40:90)")
    option("--law", choices=LAWS, help="how α follows from μ (inverse-sqrt-d: α = m·μ/√d)")
    option("--coefficients", metavar="L=α,…", help="explicit α per layer instead of a law")
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
    option("--method", choices=("mean",), help="with --pairs: how the direction is found (mean)")
    option("--token", choices=("last", "mean", "all"), help="with --pairs: tokens read (last)")
    option("--prompts", metavar="FILE", help="calibration prompts: text, JSONL or a set (neutral)")
    option("--calibration", metavar="FILE", help="norms from bake calibrate instead of measuring")
    option("--statistic", choices=("mean", "median"), help="what μ is of the token norms (mean)")
    option("--device-map", choices=("auto",), help="spread weights over GPUs, CPU and disk")
    option(
        "--max-memory", metavar="SIZES", help="weights kept in memory: 600MB, or 0=20GB,cpu=60GB"
    )
    option("--dtype", choices=("float32", "float16", "bfloat16"), help="store the checkpoint so")
    option("--allow-rounding", action="store_true", help="accept a dtype too coarse for the push")
    option(
        "--estimate",
        action="store_true",
        help="say what it would cost (bytes, memory, passes, time) from headers alone; write nothing",
    )
    option("--push-to-hub", metavar="REPO_ID", help="publish when proven (private)")
    option("--public", action="store_true", help="with --push-to-hub: make the repo public")


def _add_direction(commands: Any) -> None:
    command = commands.add_parser(
        "direction",
        help="find a direction from contrast pairs, or convert one",
        epilog="bake direction convert FILE --output FILE writes one in another tool's format; see "
        "bake direction convert --help",
    )
    command.set_defaults(run=_run_direction)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument(
        "--pairs",
        required=True,
        metavar="FILE",
        help="JSONL pairs or a set (see bake prompts list)",
    )
    command.add_argument("--output", "-o", required=True, metavar="FILE", help="safetensors file")
    command.add_argument("--method", choices=("mean",), default="mean", help="difference of means")
    command.add_argument("--token", choices=("last", "mean", "all"), default="last")
    command.add_argument("--site", choices=SITES[1:], default="mlp_out", help="(mlp_out)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _add_calibrate(commands: Any) -> None:
    command = commands.add_parser("calibrate", help="measure the activation norm of every layer")
    command.set_defaults(run=_run_calibrate)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument("--output", "-o", required=True, metavar="FILE", help="JSON file")
    command.add_argument(
        "--prompts", default="neutral", metavar="FILE", help="text, JSONL or a set (neutral)"
    )
    command.add_argument("--site", choices=SITES[1:], default="mlp_out", help="(mlp_out)")
    command.add_argument("--statistic", choices=("mean", "median"), default="mean", help="(mean)")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect", help="say which sites and routes are exact here, and why others are not"
    )
    command.set_defaults(run=_run_inspect)
    command.add_argument("model", metavar="MODEL", help="path, Hub id, or bake-demo")
    command.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="prove a baked directory again")
    command.set_defaults(run=_run_verify)
    command.add_argument("directory", metavar="DIR")
    command.add_argument(
        "--base", metavar="MODEL", help="the base (default: as bake.json names it)"
    )


def _add_placement(command: Any) -> None:
    command.add_argument(
        "--device-map", choices=("auto",), help="spread weights over GPUs, CPU and disk"
    )
    command.add_argument(
        "--max-memory", metavar="SIZES", help="weights kept in memory: 600MB, or 0=20GB,cpu=60GB"
    )


def _add_publish(commands: Any) -> None:
    command = commands.add_parser("publish", help="publish a baked directory to the Hub")
    command.set_defaults(run=_run_publish)
    command.add_argument("directory", metavar="DIR")
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument("--public", action="store_true", help="make the repo public")


def _add_prompts(commands: Any) -> None:
    command = commands.add_parser("prompts", help="list or show the prompt sets and contrast pairs")
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="every set that ships: name, kind, count, purpose")
    listing.set_defaults(run=_run_prompts_list)
    showing = actions.add_parser("show", help="print a set: texts, or pairs as two lines + and -")
    showing.set_defaults(run=_run_prompts_show)
    showing.add_argument("name", metavar="NAME", help="a name from bake prompts list")
    showing.add_argument("--limit", type=int, metavar="N", help="only the first N (all)")
    for action in (listing, showing):
        # Suppressed, or the default here would undo a --json that was given before the action.
        action.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object"
        )


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo", help="the whole pipeline on the small model that ships in the package"
    )
    command.set_defaults(run=_run_demo)
    command.add_argument("--output", "-o", metavar="DIR", help="keep the two checkpoints here")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def _run_export(parsed: argparse.Namespace) -> int:
    from bake import cost, pipeline, recipe, report, thin

    words = ("run", "command", "json", "recipe", "estimate")
    given = {k: v for k, v in vars(parsed).items() if k not in words}
    path, only = getattr(parsed, "recipe", None), hasattr(parsed, "estimate")
    wanted = (
        recipe.read_recipe(Path(path), given, without_output=only)
        if path
        else recipe.make_recipe(given, without_output=only)
    )
    if only:
        estimate = cost.estimate_cost(wanted)
        _print(parsed, estimate.to_dict(), report.describe_estimate(estimate))
    elif wanted.thin:
        added = thin.export_thin(wanted)
        _print(parsed, added.to_dict(), report.describe_thin(added))
    else:
        result = pipeline.export(wanted)
        _print(parsed, result.to_dict(), report.describe_export(result))
    return 0


def _run_direction(parsed: argparse.Namespace) -> int:
    from bake import api

    direction = api.extract_direction(
        parsed.model,
        pairs=parsed.pairs,
        output=parsed.output,
        method=parsed.method,
        token=parsed.token,
        site=parsed.site,
        revision=parsed.revision,
        device_map=parsed.device_map,
        max_memory=parsed.max_memory,
    )
    text = (
        f"{len(direction.vectors)} directions of width {direction.hidden_size} at {direction.site}, "
        f"from {direction.metadata['pairs']} pairs, in {parsed.output}"
    )
    _print(parsed, {"output": parsed.output, **direction.to_dict()}, text)
    return 0


def _run_calibrate(parsed: argparse.Namespace) -> int:
    from bake import api, report

    norms = api.calibrate(
        parsed.model,
        output=parsed.output,
        prompts=parsed.prompts,
        site=parsed.site,
        statistic=parsed.statistic,
        revision=parsed.revision,
        device_map=parsed.device_map,
        max_memory=parsed.max_memory,
    )
    text = f"{report.describe_norms(norms)}\n\nwritten to {parsed.output}"
    _print(parsed, {"output": parsed.output, **norms.to_dict()}, text)
    return 0


def _run_inspect(parsed: argparse.Namespace) -> int:
    from bake import api, report

    anatomy = api.inspect(parsed.model, revision=parsed.revision)
    _print(parsed, anatomy.to_dict(), report.describe_anatomy(anatomy))
    return 0


def _run_verify(parsed: argparse.Namespace) -> int:
    from bake import api, report

    verification = api.verify(
        parsed.directory,
        base=parsed.base,
        device_map=parsed.device_map,
        max_memory=parsed.max_memory,
    )
    equivalence = verification.equivalence
    _print(parsed, verification.to_dict(), report.describe_equivalence(equivalence))
    equivalence.raise_if_failed()
    return 0


def _run_publish(parsed: argparse.Namespace) -> int:
    from bake import api

    publication = api.publish(parsed.directory, parsed.repo_id, public=parsed.public)
    _print(parsed, publication.to_dict(), f"published as {publication.url}")
    return 0


def _run_prompts_list(parsed: argparse.Namespace) -> int:
    from bake import prompt_sets, report

    sets = prompt_sets.list_sets()
    _print(parsed, {"sets": [found.to_dict() for found in sets]}, report.describe_sets(sets))
    return 0


def _run_prompts_show(parsed: argparse.Namespace) -> int:
    from bake import prompt_sets, report

    shown = prompt_sets.show_set(parsed.name, parsed.limit)
    _print(parsed, shown.to_dict(), report.describe_set(shown))
    return 0


def _run_demo(parsed: argparse.Namespace) -> int:
    from bake.demo import showcase

    result = showcase.run(Path(parsed.output) if parsed.output else None, parsed.overwrite)
    _print(parsed, result.to_dict(), showcase.describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
