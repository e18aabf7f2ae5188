"""How a command answers: one JSON object with `--json`, text for people without, from one process."""

from __future__ import annotations

import argparse
import json
from typing import Any

from bake.processes import is_main


def print_result(parsed: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    """Print a command's result on stdout; of several processes only the main one does."""
    if is_main():
        print(json.dumps(values, indent=2, ensure_ascii=False) if parsed.json else text)
