"""Pairs that a direction is found from, and the others, which judge it."""

from __future__ import annotations

from collections.abc import Sequence

from bake.io.shipped import find_set
from bake.support.progress import announce
from bake.texts.pairs import ContrastPair, leave_out_known, read_pairs

LEAST_DIVIDED = 16  # pairs: of fewer none are kept out


def find_beside(pairs: str) -> str | None:
    """Return the held-out pairs that lie beside a file or set of pairs, NAME.held-out, if any do."""
    found = find_set(pairs, "pairs")
    beside = found.with_name(f"{found.stem}.held-out{found.suffix}") if found else None
    return str(beside) if beside and beside.is_file() else None


def read_divided(
    pairs: str | None, held_out: str | None
) -> tuple[Sequence[ContrastPair], Sequence[ContrastPair]]:
    """Read the pairs to find a direction from, and those to judge it by.

    Without a name of held-out pairs those beside the pairs are taken, or every fourth pair is kept out,
    which is announced. There may be none to judge by.
    """
    found = list(read_pairs(pairs)) if pairs is not None else []
    if held_out is None and pairs is not None:
        held_out = find_beside(pairs)
    judged = list(read_pairs(held_out)) if held_out else []
    if judged and found:
        return found, list(leave_out_known(judged, found, str(held_out)))
    if len(found) >= LEAST_DIVIDED:
        found, judged = [p for n, p in enumerate(found) if n % 4 != 3], found[3::4]
        announce(
            f"{len(judged)} of the pairs are kept out of the direction, to judge it by; give others with "
            "--held-out"
        )
    return found, judged
