"""What a sweep showed, attached to a bake: `bake export --sweep DIR` puts it into the card.

A report is only believed of the bake that it was made for: same base, direction, site, law, band and
coefficients, else it is refused before anything is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.card.figures import FIGURES
from bake.directions.direction_file import hash_vectors
from bake.errors import BakeError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import check_links
from bake.support.text import explain
from bake.sweeps.findings import compare_laws
from bake.sweeps.store import REPORT_FILE

if TYPE_CHECKING:
    from bake.strength.coefficients import Push

CARRIED = ("dose-response.png", "layers.png")  # A bake draws its norms itself.
SAME_COEFFICIENTS = 0.01  # relative; other calibration prompts give a little more
SAMPLES = 3


@dataclass(frozen=True)
class Evidence:
    """A sweep's directory and its report."""

    directory: Path
    report: Mapping[str, Any]

    def check(self, base: Mapping[str, Any], site: str, push: Push) -> None:
        """Raise BakeError naming what the sweep was made for, where it is not this bake."""
        with self._well_formed():
            self._check(base, site, push)

    def summarise(self, multiplier: float) -> dict[str, Any]:
        """Return what `bake.json` and the card hold: the curve, chance, the window, samples at m.

        Raises BakeError where the report has not what bake sweep writes.
        """
        with self._well_formed():
            return self._summarise(multiplier)

    @contextmanager
    def _well_formed(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise BakeError(
                f"{self.directory / REPORT_FILE} is not as bake sweep writes it ({explain(error)}); run "
                "bake sweep again"
            ) from None

    def _check(self, base: Mapping[str, Any], site: str, push: Push) -> None:
        first = self.report["design"]["variants"][0]
        found = {
            "base": (self.report["base"]["id"], self.report["base"]["revision"]),
            "site": first["site"],
            "law": first["law"],
            "layers": sorted(int(layer) for layer in self.report["coefficients"]),
            "direction": self.report["direction"]["sha256"],
        }
        wanted = {
            "base": (base["id"], base["revision"]),
            "site": site,
            "law": push.law,
            "layers": [entry.layer for entry in push.layers],
            "direction": hash_vectors(push.directions),
        }
        for name, value in found.items():
            if value != wanted[name]:
                raise BakeError(
                    f"--sweep {self.directory} was made for another {name} ({_short(value)}; this bake "
                    f"has {_short(wanted[name])}); run bake sweep with this bake's options"
                )
        for entry in push.layers:
            there = self.report["coefficients"][str(entry.layer)]
            here = entry.coefficient / push.multiplier
            if abs(there - here) > SAME_COEFFICIENTS * abs(here):
                raise BakeError(
                    f"--sweep {self.directory} pushed layer {entry.layer} by {there:.4g} at m = 1 and "
                    f"this bake pushes it by {here:.4g}; calibrate both on the same prompts"
                )

    def _summarise(self, multiplier: float) -> dict[str, Any]:
        report = self.report
        curve = [
            p for p in report["points"] if p["kind"] in ("base", "direction") and not p["variant"]
        ]
        steered = f"m={multiplier:+g}"
        costs = report["fluency_at_equal_shift"]
        return {
            "texts": dict(report["texts"]),
            "sampling": dict(report["design"]["sampling"]),
            "bounds": dict(report["design"]["bounds"]),
            "counts_words": any("target_share" in p for p in curve),
            "points": [_row(p) for p in sorted(curve, key=_multiplier)],
            "windows": list(report["windows"]),
            "specificity": report["specificity"],
            "laws": compare_laws(costs) if len(costs) > 1 else None,
            "instruction": next(
                (
                    {"text": p["instruction"], "shift": p["shift"]}
                    for p in report["points"]
                    if p["kind"] == "prompt"
                ),
                None,
            ),
            "samples": [
                {
                    "opening": sample["opening"],
                    "base": sample["texts"]["base"],
                    "steered": sample["texts"][steered],
                }
                for sample in report["samples"][:SAMPLES]
                if steered in sample["texts"]
            ],
            "figures": [f"{FIGURES}/{name}" for name in CARRIED if self._figure(name).is_file()],
        }

    def copy_figures(self, output: Path) -> None:
        """Copy the sweep's figures into a bake's directory."""
        for name in CARRIED:
            if self._figure(name).is_file():
                (output / FIGURES).mkdir(exist_ok=True)
                shutil.copyfile(self._figure(name), output / FIGURES / name)

    def _figure(self, name: str) -> Path:
        return self.directory / FIGURES / name


def read_evidence(directory: Path) -> Evidence:
    """Read a sweep's report; raise BakeError where there is none, or it is not a report."""
    path = directory / REPORT_FILE
    check_links(
        directory, [REPORT_FILE, *(f"{FIGURES}/{name}" for name in CARRIED)], error=BakeError
    )
    report = read_json(path, error=BakeError, remedy="give the directory that bake sweep wrote")
    needed = ("base", "direction", "design", "coefficients", "points", "windows", "texts")
    missing = [key for key in needed if key not in report]
    direction = report.get("direction")
    known = isinstance(direction, dict) and "sha256" in direction
    if missing or report.get("version") != 1 or not known:
        raise BakeError(f"{path} is not a report of bake sweep, version 1; run bake sweep again")
    if not report.get("complete"):
        raise BakeError(f"--sweep {directory} is not finished: run the same bake sweep again")
    return Evidence(directory, report)


def _multiplier(point: Mapping[str, Any]) -> float:
    return float(point["multiplier"])


def _row(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of the card's table, None for what was not measured."""
    return {
        "multiplier": point["multiplier"],
        "shift": point.get("shift"),
        "accuracy": (point.get("accuracy") or {}).get("value"),
        "target_ratio": (point.get("target_ratio") or {}).get("value"),
        "target_share": (point.get("target_share") or {}).get("value"),
        "fluency_ratio": (point.get("fluency_ratio") or {}).get("value"),
        "neutral_ratio": (point.get("neutral_ratio") or {}).get("value"),
        "on_axis_ratio": (point.get("on_axis_ratio") or {}).get("value"),
        "opposite_ratio": (point.get("opposite_ratio") or {}).get("value"),
        "neutral_kl_p95": point["neutral_kl"].get("p95", {}).get("value"),
        "repetition": (point.get("repetition") or {}).get("value"),
    }


def _short(value: Any) -> str:
    text = str(value[0] if isinstance(value, tuple) and value[1] is None else value)
    return text if len(text) <= 40 else text[:12] + "…"
