"""`bake verify`: the proof again, or a server asked whether it serves the bake."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of
from bake.errors import BakeError, EquivalenceError


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api, report

    if parsed.endpoint:
        checked = api.verify_endpoint(
            parsed.endpoint, parsed.model, directory=parsed.directory, revision=parsed.revision
        )
        print_result(parsed, checked.to_dict(), checked.describe())
        return 0 if checked.verdict == "baked" else EquivalenceError.exit_code
    if parsed.model:
        raise BakeError("--model is what a server calls the model; it goes with --endpoint URL")
    options = options_of(parsed)
    del options["endpoint"], options["model"]
    verification = api.verify(**options)
    equivalence = verification.equivalence
    print_result(parsed, verification.to_dict(), report.describe_equivalence(equivalence))
    equivalence.raise_if_failed()
    return 0
