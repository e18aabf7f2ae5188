"""Measurements kept in a file as they are made, so that a sweep that was interrupted goes on.

The file is a log: what decides the measurements in its first line, then a line for every text. A process
that is killed leaves at most one torn line, the last, which is measured again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bake.dose_response.measurements import Each, Measurements, join
from bake.errors import OutputError
from bake.progress import announce, track

MEASUREMENTS_FILE, REPORT_FILE = "measurements.jsonl", "report.json"


class Store:
    """The log of one sweep. Raises OutputError where it cannot be written.

    fingerprint: names everything that decides the measurements; a log with another one is begun anew.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / MEASUREMENTS_FILE
        self.values: dict[str, list[Any]] = {}
        whole = self._read(fingerprint)
        if whole:
            os.truncate(self.path, whole)  # Of a torn last line nothing stays.
        else:
            self._append({"fingerprint": fingerprint}, "w")

    def keep(self, stage: str, measure: Callable[[], Any]) -> Any:
        """Return a plain value that is measured once, from the log if it is there."""
        if stage not in self.values:
            self._add(stage, measure())
        return self.values[stage][0]

    def each(self, stage: str) -> Each:
        """Return what measures texts one by one, those that are not in the log."""

        def measure_each(
            texts: Sequence[Any], label: str, measure: Callable[[Any], Measurements]
        ) -> Measurements:
            known = len(self.values.get(stage, ()))
            if known:
                announce(f"{label}: {known} of {len(texts)} measured before")
            for text in track(texts[known:], label):
                self._add(stage, measure(text))
            return join(self.values.get(stage, ()))

        return measure_each

    def _read(self, fingerprint: str) -> int:
        """Fill `values`; return how many bytes of the log are whole lines of this sweep."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror or error}") from None
        whole = 0
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if whole == 0 and entry != {"fingerprint": fingerprint}:
                return 0
            if entry is None:
                break
            if whole:
                self.values.setdefault(entry["stage"], []).append(entry["value"])
            whole += len(line)
        return whole

    def _add(self, stage: str, value: Any) -> None:
        self._append({"stage": stage, "value": value}, "a")
        self.values.setdefault(stage, []).append(value)

    def _append(self, entry: dict[str, Any], mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from None
