"""`bake undo`: the base, from the bake alone."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    found = api.undo(**options_of(parsed))
    text = (
        f"{found.output}: {found.base} with its {found.tensors} tensors; {found.dropped} of the bake's "
        f"dropped, {len(found.restored)} patched ones restored; "
        f"{len(found.whole_files)} weight files as they were, byte for byte"
    )
    print_result(parsed, found.to_dict(), text)
    return 0
