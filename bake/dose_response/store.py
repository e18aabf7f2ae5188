"""Measurements kept in a file, stage by stage, so that a sweep that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bake.dose_response.arms import Arm
from bake.dose_response.design import Design
from bake.dose_response.measurements import Measurements, Texts
from bake.errors import OutputError
from bake.progress import announce

MEASUREMENTS_FILE, REPORT_FILE = "measurements.json", "report.json"


def fingerprint_of(arms: Sequence[Arm], design: Design, texts: Texts) -> str:
    """Return a hash of everything that decides the measurements."""
    digest = hashlib.sha256()
    for arm in arms:
        digest.update(json.dumps(arm.to_dict(), sort_keys=True).encode())
        for layer, vector in sorted(arm.push.items()):
            digest.update(str(layer).encode())
            digest.update(vector.float().numpy().tobytes())
    digest.update(json.dumps(asdict(design.sampling)).encode())
    for value in (texts.neutral, texts.openings, [asdict(pair) for pair in texts.pairs]):
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


class Store:
    """Keeps a sweep's measurements in a file, stage by stage, for a run that comes after a break."""

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.path = folder / MEASUREMENTS_FILE if folder else None
        self.values: dict[str, Any] = {"fingerprint": fingerprint}
        if self.path is not None and self.path.exists():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = {}
            if before.get("fingerprint") == fingerprint:
                self.values = before

    def keep(self, stage: str, measure: Any) -> Measurements:
        """Return a stage's measurements, from the file if it has them."""
        if stage in self.values:
            announce(f"{stage}: measured before, taken from {MEASUREMENTS_FILE}")
        else:
            self.values[stage] = measure()
            self._write()
        found: Measurements = self.values[stage]
        return found

    def _write(self) -> None:
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(self.values), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from None
