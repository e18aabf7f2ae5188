"""What came of the runs: each case's verdict in an engine, beside what transformers computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

# Largest difference from transformers, of the bake's largest effect. An exact GELU for its tanh form is
# 3e-3 of it; another model is far beyond.
CLOSE = 1e-2
# What an engine could not be asked: vLLM's latent attention takes no float32 on a CPU, and llama.cpp ends
# while it loads models of these families that are so small.
NOT_RUN = {"vllm": {"youtu"}, "llama.cpp": {"dots1", "youtu"}}


@dataclass(frozen=True)
class Row:
    """One case in one engine, as a line of the table.

    verdict: `kept` (the engine computes the bake as transformers does), `error` (it does not load it),
    `dropped` (it runs something else), or `base` (already the base is something else, or does not load).
    error, base_error: the largest difference of a log-probability from transformers', of the bake's effect.
    """

    engine: str
    version: str
    date: str
    family: str
    spelling: str
    site: str
    kind: str
    host: str
    verdict: str
    error: str
    base_error: str
    remark: str

    @classmethod
    def header(cls) -> list[str]:
        """Return the names of the columns."""
        return [entry.name for entry in fields(cls)]


def judge(engine: str, cases: Path, output: Path, date: str) -> Iterator[Row]:
    """Yield a row for every case that an engine was given."""
    version = (output / "version").read_text(encoding="utf-8")
    for case in json.loads((cases / "cases.json").read_text(encoding="utf-8")):
        if case["family"] in NOT_RUN.get(engine, ()):
            continue
        references = [np.load(cases / case[key] / "reference.npy") for key in ("base", "name")]
        effect = float(np.abs(references[1] - references[0]).max())
        base, remark = _compare(output, case["base"], references[0], effect)
        baked, told = _compare(output, case["name"], references[1], effect)
        if baked is not None and baked < CLOSE:
            verdict = "kept"
        elif not case["host"] and (base is None or base >= CLOSE):
            verdict, told = "base", remark or told
        else:
            verdict = "error" if baked is None else "dropped"
        yield Row(
            engine,
            version,
            date,
            *(case[key] for key in ("family", "spelling", "site", "kind", "host")),
            verdict,
            "" if baked is None else f"{baked:.0e}",
            "" if base is None else f"{base:.0e}",
            told,
        )


def _compare(
    output: Path, name: str, reference: np.ndarray, effect: float
) -> tuple[float | None, str]:
    """Return (largest difference of the effect, "") or (None, what went wrong)."""
    found = output / f"{name}.npy"
    if not found.exists():
        return None, (output / f"{name}.error").read_text(encoding="utf-8")
    rows = np.load(found)
    known = ~np.isnan(rows)
    return float(np.abs(rows - reference)[known].max()) / effect, ""
