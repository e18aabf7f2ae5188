"""Run bakes of many families in other engines and record what came of it.

    python benchmarks/engines.py ENGINE... [--llama-cpp DIR] [--models DIR] [--date YYYY-MM-DD]
    python benchmarks/engines.py --table

ENGINE: mlx, vllm, transformers (4.57, what many servers still have) or llama.cpp. Each but the last gets an
environment of its own below build/engines. The rows of an engine in tests/data/engines.csv are replaced by
what ran, and docs/engine-table.md is written anew.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engines"))

from harness import llama_cpp, record  # noqa: E402
from harness.cases import write_cases  # noqa: E402
from harness.table import TABLE, read_rows, render  # noqa: E402

CASES = record.BUILD / "cases"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "engines", nargs="*", choices=[*record.PACKAGES, "llama.cpp", []], metavar="ENGINE"
    )
    parser.add_argument("--llama-cpp", help="a checkout of llama.cpp that was built")
    parser.add_argument("--models", default="build/real-models", help="of make test-real")
    parser.add_argument("--date", default=date.today().isoformat())
    parser.add_argument("--table", action="store_true", help="write the table alone")
    asked = parser.parse_args()
    if any(engine in record.PACKAGES for engine in asked.engines):
        write_cases(CASES)
        record.record_outlines(CASES)
    for engine in asked.engines:
        if engine == "llama.cpp":
            rows = llama_cpp.run(
                asked.llama_cpp, Path(asked.models), record.BUILD / "llama.cpp", asked.date
            )
        else:
            python, output = record.environment(engine), record.BUILD / f"{engine}-out"
            rows = record.run(engine, python, CASES, output, asked.date)
        record.record(engine, rows)
    TABLE.write_text(render(read_rows(record.RECORD)), encoding="utf-8")


if __name__ == "__main__":
    main()
