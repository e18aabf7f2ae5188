"""The table of docs/engine-table.md, made of what ran."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from .judge import Row

TABLE = Path(__file__).parents[3] / "docs" / "engine-table.md"
_NAMES = {
    "llama.cpp": "llama.cpp",
    "mlx": "MLX-lm",
    "transformers": "transformers",
    "vllm": "vLLM",
}
_WORDS = {"kept": "✓", "error": "does not load", "dropped": "another model", "base": "base differs"}
_HEAD = """# What ran where

Small random bases of {families} families, baked by every exact route, and run in other engines: {versions}.
The log-probabilities of every token after several beginnings are compared with transformers 5's. This page
is written by `benchmarks/engines.py` from `tests/data/engines.csv`, which has the figures.

✓: the largest difference is below 1 % of the bake's effect. *another model*: it runs, and computes
something else. *base differs*, *no base*: already the base, without a push, is another model there, or
does not load. Two words, where they are not the same: for a config.json as the Hub has it (`rope_theta`),
and then as transformers 5 saves it (`rope_parameters` alone). A host's config.json has both spellings
either way. –: not run.

"""


def read_rows(path: Path) -> list[Row]:
    """Return the recorded rows; none where there is no record."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [Row(**row) for row in csv.DictReader(stream)]


def render(rows: Sequence[Row]) -> str:
    """Return the page."""
    engines = sorted({row.engine for row in rows})
    versions = {row.engine: f"{_NAMES[row.engine]} {row.version} ({row.date})" for row in rows}
    found: dict[tuple[str, str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = (row.family, row.site, row.kind, row.host)
        found.setdefault(key, {}).setdefault(row.engine, {})[row.spelling] = _say(row)
    lines = [
        f"| family | site | {' | '.join(_NAMES[engine] for engine in engines)} |",
        f"|---|---|{'---|' * len(engines)}",
    ]
    for (family, site, kind, host), cells in sorted(found.items()):
        where = f"{site}, as {host}" if host else f"{site}, {kind}" if kind == "norm" else site
        told = " | ".join(_cell(cells.get(engine, {})) for engine in engines)
        lines.append(f"| {family} | {where} | {told} |")
    head = _HEAD.format(
        families=len({row.family for row in rows}),
        versions="; ".join(versions[engine] for engine in engines),
    )
    return head + "\n".join(lines) + "\n"


def _say(row: Row) -> str:
    """Return a verdict in words; of a base, whether it is another model or none."""
    if row.verdict == "base" and not row.base_error:
        return "no base"
    return _WORDS[row.verdict]


def _cell(verdicts: dict[str, str]) -> str:
    """Return what an engine does with a bake, in either spelling of its base where they differ."""
    told = [verdicts[key] for key in ("", "rope_theta", "rope_parameters") if key in verdicts]
    return " · ".join(dict.fromkeys(told)) or "–"
