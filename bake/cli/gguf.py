"""`bake gguf`: a bake as a file for llama.cpp, Ollama and LM Studio."""

from __future__ import annotations

import argparse

from bake.cli.output import print_result
from bake.cli.parser import options_of


def run(parsed: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from bake import api

    found = api.gguf(**options_of(parsed))
    print_result(parsed, found.to_dict(), found.describe())
    return 0
