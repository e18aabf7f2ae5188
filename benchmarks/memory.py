"""Peak anonymous memory of a command and its children, sampled from /proc every 20 ms.

RssAnon is what a process cannot give back: pages of memory-mapped files (shards, logits kept on disk) are
left out, because the kernel drops them when memory is short. Linux only.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """Exit code, seconds, and the largest sum of RssAnon over the process tree, in bytes."""

    returncode: int
    seconds: float
    peak_anonymous: int


def run_measured(command: Sequence[str], **options: object) -> Run:
    """Run a command to its end and sample its process tree."""
    start = time.perf_counter()
    process = subprocess.Popen(command, **options)  # type: ignore[call-overload]
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_anonymous(pid) for pid in _tree(process.pid)))
        time.sleep(0.02)
    return Run(process.returncode, time.perf_counter() - start, peak)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        found += [int(child) for child in children]
    return found


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
