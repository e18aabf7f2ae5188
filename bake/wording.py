"""How numbers of layers are said to the user."""

from __future__ import annotations

from collections.abc import Iterable


def list_numbers(numbers: Iterable[int]) -> str:
    """Return ascending numbers as text, runs of three and more as a range: "0-5, 7, 9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
