"""The plain process seen from bake: start it, ask it, keep it for the next question.

Nearly all that a plain process costs is importing torch and transformers. Inside `kept_plain_process` one
process serves every request of its block; outside, a request has a process of its own. It is another one
wherever the environment changed, which libraries read when they are imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bake.errors import EquivalenceError

SCRIPT = Path(__file__).with_name("plain.py")
# What libraries set for themselves while they run; nobody who asks meant a change by it.
_OWN_OF_OTHERS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")


class PlainProcess:
    """One process that runs `bake/proof/plain.py` and answers requests, one at a time."""

    def __init__(self) -> None:
        self.environment = _environment()
        self._messages: IO[str] = tempfile.TemporaryFile(  # noqa: SIM115 — closed by close().
            "w+", encoding="utf-8", errors="replace"
        )
        # -P keeps this package's folder off the path: the process must not be able to find bake's
        # modules by accident.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
        )

    @property
    def usable(self) -> bool:
        """Tell whether it lives, in the environment that this process has now."""
        return self._process.poll() is None and self.environment == _environment()

    def ask(self, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return the answer to a request as `bake/proof/plain.py` describes it, handed over in `folder`.

        Raises EquivalenceError where the checkpoint cannot be loaded or run there.
        """
        asked, answered = folder / "request.json", folder / "result.json"
        asked.write_text(json.dumps({**request, "result": str(answered)}), encoding="utf-8")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{asked}\n")
            self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise EquivalenceError(_cannot_load(self._last_message()))
        result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        if result["error"]:
            raise EquivalenceError(_cannot_load(result["error"]))
        return result

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.kill()
        self._process.wait()
        self._messages.close()

    def _last_message(self) -> str:
        self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._process.returncode}"


_kept: list[PlainProcess] = []
_keepers = 0


@contextlib.contextmanager
def kept_plain_process(*, start: bool = False) -> Iterator[None]:
    """Keep one plain process for all requests of the block; the first one starts it, the end closes it.

    start: start it at once, so that it imports what it needs while other work goes on.
    """
    global _keepers
    _keepers += 1
    try:
        if start:
            _usable()
        yield
    finally:
        _keepers -= 1
        if _keepers == 0:
            _close_kept()


def ask_plain_process(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ask the kept process, or one that is started for this request. Raises EquivalenceError."""
    with kept_plain_process():
        return _usable().ask(request, folder)


def _usable() -> PlainProcess:
    if not _kept or not _kept[0].usable:
        _close_kept()
        _kept[:] = [PlainProcess()]
    return _kept[0]


def _close_kept() -> None:
    while _kept:
        _kept.pop().close()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OWN_OF_OTHERS}


def _cannot_load(reason: str) -> str:
    return f"plain transformers cannot load the baked checkpoint: {reason}"
