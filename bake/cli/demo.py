"""`bake demo`: the pipeline on the model that ships."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bake.cli.output import print_result


def add(commands: Any) -> None:
    """Add the command's parser."""
    command = commands.add_parser(
        "demo",
        help="the whole pipeline on the small model that ships in the package",
        description="Bake the shipped direction at m = 1 and −1, prove both, and compare text that base "
        "and bakes write. Nothing is downloaded; it takes less than a minute.",
    )
    command.set_defaults(run=run)
    command.add_argument("--output", "-o", metavar="DIR", help="keep the two checkpoints here")
    command.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake.demo import showcase

    result = showcase.run(Path(parsed.output) if parsed.output else None, parsed.overwrite)
    print_result(parsed, result.to_dict(), showcase.describe(result))
    return 0
