"""`bake demo`: the pipeline on the model that ships."""

from __future__ import annotations

import argparse
from pathlib import Path

from bake.cli.output import print_result


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake.demo import showcase

    result = showcase.run(Path(parsed.output) if parsed.output else None, parsed.overwrite)
    print_result(parsed, result.to_dict(), showcase.describe(result))
    return 0
