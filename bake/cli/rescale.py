"""`bake rescale`: another strength, in place."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    found = api.rescale(**options_of(parsed))
    text = (
        f"{found.directory}: m = {found.before:g} is now m = {found.multiplier:g}; new bytes in "
        f"{', '.join(found.files)}\nnot verified at this strength: bake verify {found.directory}"
    )
    print_result(parsed, found.to_dict(), text)
    return 0
