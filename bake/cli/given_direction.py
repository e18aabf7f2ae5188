"""What `bake direction` does with directions that exist: `bake direction convert FILE` and `show FILE`.

`bake direction MODEL --pairs FILE` finds one and is `bake.cli.direction`'s; a first word that is in
COMMANDS is a command of its own. A model that lies in a folder of that name is `./convert`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from bake.cli.output import print_result
from bake.sites import SITES


def is_command(words: Sequence[str]) -> bool:
    """Tell whether the command line, without the program's name, is one of these commands."""
    return len(words) > 1 and words[0] == "direction" and words[1] in COMMANDS


def build_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one of the commands, for the words after its name."""
    parser = argparse.ArgumentParser(prog=f"bake direction {name}")
    COMMANDS[name](parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _build_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a direction in another tool's format, with its own lengths: .gguf for llama.cpp's "
        "--control-vector and repeng, .npy and .npz for numpy, .safetensors for bake."
    )
    parser.set_defaults(run=_run_convert)
    parser.add_argument("file", metavar="FILE", help="any direction that bake export takes")
    parser.add_argument(
        "--output", "-o", required=True, metavar="FILE", help="its suffix names the format"
    )
    _add_understanding(parser)
    parser.add_argument(
        "--model-hint", metavar="NAME", help="GGUF: the architecture, such as llama"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, metavar="N", help="how many the model has")
    size.add_argument("--model", metavar="MODEL", help="the model, whose config says how many")


def _run_convert(parsed: argparse.Namespace) -> int:
    from bake import api

    converted = api.convert_direction(
        parsed.file,
        output=parsed.output,
        layer_offset=parsed.layer_offset,
        site=parsed.direction_site,
        model_hint=parsed.model_hint,
        layers=parsed.layers,
        model=parsed.model,
    )
    print_result(parsed, converted.to_dict(), converted.describe())
    return 0


def _build_show(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what a direction says: the tokens it raises and lowers most through the model's final norm "
        "and unembedding, its cosines to other directions, and how well it separates pairs."
    )
    parser.set_defaults(run=_run_show)
    parser.add_argument("file", metavar="FILE", help="direction file, or bake-demo")
    parser.add_argument("--model", metavar="MODEL", help="path, Hub id, or bake-demo")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FILE",
        help="other directions: their cosines to it",
    )
    parser.add_argument(
        "--tokens", type=int, default=10, metavar="N", help="how many of each kind (10)"
    )
    _add_understanding(parser)


def _add_understanding(parser: argparse.ArgumentParser) -> None:
    """Add the options that correct how FILE is understood."""
    parser.add_argument("--layer-offset", type=int, metavar="N", help="added to FILE's layers (0)")
    parser.add_argument("--direction-site", choices=SITES, help="where FILE was found (mlp_out)")


def _run_show(parsed: argparse.Namespace) -> int:
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


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "convert": _build_convert,
    "show": _build_show,
}
