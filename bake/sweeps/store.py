"""Measurements kept in a file as they are made, so that a sweep that was interrupted goes on.

The file is a log: what decides the measurements in its first line, then a line for every text, with the
text's number. A process that is killed leaves at most one torn line, the last, which is measured again.
One sweep at a time writes it: it is locked, with flock, as long as it is open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self

from bake.errors import OutputError
from bake.io.work_directory import try_lock
from bake.support.processes import count, divide, on_main, put_together
from bake.support.progress import announce, track
from bake.sweeps.measurements import Each, Measurements, join

MEASUREMENTS_FILE, REPORT_FILE = "measurements.jsonl", "report.json"


class Store:
    """The log of one sweep, open and locked until `close`; also a context manager.

    fingerprint: names everything that decides the measurements; a log with another one is begun anew.
    Raises OutputError where it cannot be written, another sweep has it open, or it is damaged.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.path = folder / MEASUREMENTS_FILE
        self._file: IO[bytes] | None = None
        self.values: dict[str, list[Any]] = on_main(lambda: self._open(folder, fingerprint))

    def _open(self, folder: Path, fingerprint: str) -> dict[str, list[Any]]:
        """Open and lock the log; return what it holds."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            if try_lock(descriptor) is False:
                raise OutputError(
                    f"another run is writing into {folder}: wait for it, or give another --output"
                )
            values, size = self._read(self._file, fingerprint)
            self._file.truncate(size)  # Of a torn last line nothing stays.
            if self._file.seek(0, os.SEEK_END) == 0:
                self._append({"fingerprint": fingerprint})
            return values
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the log."""
        if self._file is not None:
            self._file.close()

    def keep(self, stage: str, measure: Callable[[], Any]) -> Any:
        """Return a plain value that is measured once, from the log if it is there."""
        if stage not in self.values:
            self._add(stage, measure())
        self._check_count(stage, 1)
        return self.values[stage][0]

    def each(self, stage: str) -> Each:
        """Return what measures texts one by one, or one in each process; those that are not in the log."""

        def measure_each(
            texts: Sequence[Any], label: str, measure: Callable[[Any], Measurements]
        ) -> Measurements:
            known = len(self.values.get(stage, ()))
            if known:
                announce(f"{label}: {known} of {len(texts)} measured before")
            self._check_count(stage, len(texts))
            for first in track(range(known, len(texts), count()), label):
                own = divide(texts[first : first + count()])
                for value in put_together([measure(text) for text in own]):
                    self._add(stage, value)
            return join(self.values.get(stage, ()))

        return measure_each

    def _read(self, file: IO[bytes], fingerprint: str) -> tuple[dict[str, list[Any]], int]:
        """Return what the log holds, and how many bytes of it are whole lines of this run."""
        try:
            lines = file.readlines()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if not lines or lines[0] != _encode({"fingerprint": fingerprint}):
            return {}, 0
        values: dict[str, list[Any]] = {}
        whole = lines if lines[-1].endswith(b"\n") else lines[:-1]
        for number, line in enumerate(whole[1:], start=2):
            try:
                entry = json.loads(line)  # A figure may be infinite, which is no JSON of others.
                known = values.setdefault(entry["stage"], [])
                value, fits = entry["value"], entry["index"] == len(known)
            except (ValueError, TypeError, LookupError, RecursionError):
                fits = False
            if not fits:
                raise OutputError(
                    f"{self.path}:{number} is not the measurement that comes next; remove the file, "
                    "and it begins anew"
                )
            known.append(value)
        return values, sum(map(len, whole))

    def _check_count(self, stage: str, texts: int) -> None:
        found = len(self.values.get(stage, ()))
        if found > texts:
            raise OutputError(
                f"{self.path} has {found} measurements of {stage!r} for {texts}; remove the file, and "
                "it begins anew"
            )

    def _add(self, stage: str, value: Any) -> None:
        known = self.values.setdefault(stage, [])
        self._append({"stage": stage, "index": len(known), "value": value})
        known.append(value)

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:  # Another process writes it.
            return
        try:
            self._file.write(_encode(entry))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from None


def _encode(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
