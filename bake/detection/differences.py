"""What is neither a push nor an ablation: how much differs from the base, and what it looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from bake.checkpoint.ranged import RangedTensors
from bake.detection.alignment import Aligned, Comparison

if TYPE_CHECKING:
    import torch

LOOKED_AT, ROWS = 8, 256  # matrices, spread over all that changed, and rows of each
HELD = 0.99  # of a change's squares, in so many directions
FEW_LEVELS = 256  # values in a row: eight bits


@dataclass(frozen=True)
class Look:
    """A matrix's change, seen in a few rows. size: ‖Δ‖ / ‖W‖. rank: directions that hold 99 % of Δ².

    most: the rank that it could have. levels: the median of how many values a row of the suspect takes.
    zeroed: whether all that changed is zero now.
    """

    size: float
    rank: int
    most: int
    levels: int
    zeroed: bool

    @staticmethod
    def at(own: torch.Tensor, old: torch.Tensor) -> Look | None:
        """Look at rows of a matrix, (rows, columns); None where there is nothing to be seen."""
        import torch

        new, before = own.double().flatten(0, -2), old.to(own.dtype).double().flatten(0, -2)
        moved = new - before
        if not bool(moved.isfinite().all()) or not moved.any() or not before.any():
            return None
        held = torch.linalg.svdvals(moved).square().cumsum(0)
        rank = int((held < HELD * held[-1]).sum()) + 1
        levels = int(median(len(row.unique()) for row in new[:32]))
        zeroed = not bool(new[moved != 0].any())
        return Look(float(moved.norm() / before.norm()), rank, len(held), levels, zeroed)


def describe_differences(
    suspect: RangedTensors,
    base: Aligned,
    compared: Comparison,
    left: Sequence[str],
    strange: Sequence[str],
) -> Iterator[str]:
    """Yield sentences on what pushes and ablations do not explain.

    left: the suspect's tensors with other values; strange: its tensors that the base has not.
    """
    entries = suspect.checkpoint.tensors
    if left:
        matrices = [name for name in left if len(entries[name].shape) > 1]
        yield (
            f"{len(left)} of {len(entries)} tensors ({len(matrices)} matrices) have other values, "
            f"{left[0]} the first"
        )
        comparable = [name for name in matrices if base.shapes[name] == tuple(entries[name].shape)]
        looks = [look for name in _spread(comparable) if (look := _look(suspect, base, name))]
        if looks:
            yield _describe_looks(looks)
    if strange:
        yield f"{len(strange)} tensors are not the base's, {strange[0]} the first"
    if compared.gone:
        yield f"{len(compared.gone)} of the base's tensors are not there, {compared.gone[0]} the first"


def _spread(names: Sequence[str]) -> Sequence[str]:
    return names[:: max(1, -(-len(names) // LOOKED_AT))]


def _look(suspect: RangedTensors, base: Aligned, name: str) -> Look | None:
    return Look.at(suspect.rows(name, ROWS), base.readers[name](ROWS))


def _describe_looks(looks: Sequence[Look]) -> str:
    sizes, ranks = [look.size for look in looks], [look.rank for look in looks]
    most = max(look.most for look in looks)
    said = (
        f"the matrices moved by {min(sizes):.2g} to {max(sizes):.2g} of their norm, in {min(ranks)} to "
        f"{max(ranks)} of {most} directions"
    )
    if all(look.zeroed for look in looks):
        return f"{said}; what moved is zero now, as pruning leaves it"
    if all(look.levels <= FEW_LEVELS < look.most or look.levels <= 16 for look in looks):
        levels = max(look.levels for look in looks)
        return f"{said}; a row takes {levels} values, as quantising and turning back leaves it"
    if max(ranks) <= most // 4:
        return f"{said}, as a merged low-rank adapter leaves it"
    return f"{said}, as further training, merging or rounding leaves it"
