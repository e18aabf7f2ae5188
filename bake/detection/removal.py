"""A subspace that matrices lost: the direction that the changes of all that writes have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bake.anatomy import Anatomy
from bake.checkpoint.names import DiskNames
from bake.checkpoint.ranged import RangedTensors
from bake.detection.alignment import Aligned
from bake.detection.findings import AblationFound
from bake.errors import UnsupportedError
from bake.writes import Write, WriteMap

if TYPE_CHECKING:
    import torch

SAMPLED_ROWS = 256  # of an embedding, in which what it lost shows
MOST_RANK, HELD = 8, 0.9  # of the changes' squares, in so many directions
MOST_RESIDUAL = 0.35  # of a matrix's change: bfloat16 rounds the whole of it again
LEAST_MATRICES = 2
# Of the next smallest eigenvalue, below which what is left of a direction is rounding.
GAP = 0.02
NATURAL = 0.99  # cosine with a channel or with the mean


def find_writes(anatomy: Anatomy) -> WriteMap | None:
    """Return what writes to the residual stream; None where that is not known to be exact."""
    try:
        return anatomy.ablation.choose(None, anatomy.model_type)
    except UnsupportedError:
        return None


def find_ablation(
    suspect: RangedTensors,
    base: Aligned,
    names: DiskNames,
    writes: WriteMap,
    changed: frozenset[str],
) -> AblationFound | None:
    """Return what the changed matrices lost, where one subspace explains them all; None where none does.

    changed: names on disk.
    """
    listed = [
        (name, write, layer)
        for write, layer in _with_layers(writes)
        for name in names.sources(write.parameter) or (names.find(write.parameter) or "",)
        if name in changed and len(base.shapes[name]) > 1
        if base.shapes[name] == tuple(suspect.checkpoint.entry(name).shape)
    ]
    if not listed:
        return None
    silenced = _find_silenced(suspect, base, listed)
    if silenced is not None:
        return silenced
    whole = _explain(suspect, base, listed)
    if whole is not None:
        layers = tuple(sorted({layer for _, _, layer in listed if layer is not None}))
        every = set(layers) == set(writes.by_layer) and any(layer is None for _, _, layer in listed)
        return AblationFound("stream" if every else "writes", layers, *whole)
    parts = []
    for layer in sorted({layer for _, _, layer in listed if layer is not None}):
        found = _explain(suspect, base, [entry for entry in listed if entry[2] == layer])
        if found is None:
            return None
        parts.append((layer, found))
    if not parts:
        return None
    strengths = {name: share for _, (_, own, _) in parts for name, share in own.items()}
    worst = max(residual for _, (_, _, residual) in parts)
    return AblationFound(
        "writes", tuple(layer for layer, _ in parts), parts[0][1][0], strengths, worst
    )


Listed = list[tuple[str, Write, "int | None"]]


def _with_layers(writes: WriteMap) -> Iterator[tuple[Write, int | None]]:
    for write in writes.embeddings:
        yield write, None
    for layer, parts in writes.by_layer.items():
        for write in parts.writes:
            yield write, layer


def _both(
    suspect: RangedTensors, base: Aligned, name: str, write: Write, layer: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix's rows along the stream, (…, hidden_size) float64, of the suspect and of the base."""
    sampled = SAMPLED_ROWS if layer is None and write.axis == -1 else None
    own = suspect.read(name) if sampled is None else suspect.rows(name, sampled)
    old = base.readers[name](sampled).to(own.dtype)

    def along_the_stream(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.double().movedim(write.axis, -1).flatten(0, -2)

    return along_the_stream(own), along_the_stream(old)


def _explain(
    suspect: RangedTensors, base: Aligned, listed: Listed
) -> tuple[torch.Tensor, dict[str, float], float] | None:
    """Return (basis, {tensor: share that is gone}, largest residual), or None for no common subspace."""
    import torch

    total: torch.Tensor | None = None
    for name, write, layer in listed:
        own, old = _both(suspect, base, name, write, layer)
        moved = own - old
        size = float((moved**2).sum())
        if size == 0:
            continue
        part = moved.T @ moved / size
        total = part if total is None else total + part
    if total is None or not bool(total.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(total)
    held = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    rank = int((held < HELD).sum()) + 1
    if rank > min(MOST_RANK, len(values) // 4):
        return None
    basis = vectors[:, -rank:].T
    strengths, worst = {}, 0.0
    for name, write, layer in listed:
        own, old = _both(suspect, base, name, write, layer)
        moved, before = own - old, old @ basis.T
        if not before.any() or not moved.any():
            continue
        share = float(-((moved @ basis.T) * before).sum() / (before**2).sum())
        left = (moved + share * before @ basis).norm() / moved.norm()
        strengths[name], worst = share, max(worst, float(left))
    if not strengths or worst > MOST_RESIDUAL:
        return None
    return basis, strengths, worst


def _find_silenced(suspect: RangedTensors, base: Aligned, listed: Listed) -> AblationFound | None:
    """Return the columns of output projections that are zero, where that is all that changed in them."""
    columns: dict[str, tuple[int, ...]] = {}
    layers = set()
    for name, write, layer in listed:
        if layer is None:
            return None
        own, old = _both(suspect, base, name, write, layer)
        moved = (own != old).any(dim=-1)
        if own[moved].any():
            return None
        if moved.any():
            columns[name] = tuple(int(place) for place in moved.nonzero()[:, 0])
            layers.add(layer)
    return AblationFound("parts", tuple(sorted(layers)), columns=columns) if columns else None


def gap_matrices(
    suspect: RangedTensors, names: DiskNames, writes: WriteMap
) -> list[tuple[str, int]]:
    """Return the output projections of four layers, (name on disk, axis along the stream)."""
    layers = sorted(writes.by_layer)
    chosen = layers[:: max(1, len(layers) // 4)][:4]
    return [
        (name, write.axis)
        for layer in chosen
        for write in writes.by_layer[layer].writes
        if (name := names.find(write.parameter)) is not None
        and len(suspect.checkpoint.entry(name).shape) == 2
    ]


def find_common_gap(
    suspect: RangedTensors, names: DiskNames, writes: WriteMap, hidden_size: int
) -> AblationFound | None:
    """Return the direction along which no matrix that was looked at writes anything; None for none.

    Without a base: the smallest eigenvalues of Σ W Wᵀ / ‖W‖² over the output projections of a few layers,
    in units of the next. What nobody took out is not many times smaller than its neighbour, but for two
    directions that training or tools leave empty: the mean over the width, which LayerNorm does not read,
    and single channels. These are not counted.
    """
    import torch

    layers = sorted(writes.by_layer)
    total = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)
    columns = 0
    for name, axis in gap_matrices(suspect, names, writes):
        matrix = suspect.read(name).double().movedim(axis, -1)
        if matrix.shape[-1] != hidden_size or not matrix.any():
            continue
        total += matrix.T @ matrix / (matrix**2).sum()
        columns += len(matrix)
    if columns < LEAST_MATRICES * hidden_size or not bool(total.isfinite().all()):
        return None
    looked_at = min(MOST_RANK, hidden_size - 1)
    values, vectors = torch.linalg.eigh(total)
    gaps = [float(values[rank] / values[rank + 1].clamp(min=1e-300)) for rank in range(looked_at)]
    rank = min(range(looked_at), key=lambda place: gaps[place])
    basis = vectors[:, : rank + 1].T.contiguous()
    natural = (basis.abs().amax(dim=1) > NATURAL) | (
        basis.mean(dim=1).abs() * hidden_size**0.5 > NATURAL
    )
    if gaps[rank] > GAP or bool(natural.all()):
        return None
    return AblationFound("stream", tuple(layers), basis[~natural])


def lost_part(ablation: AblationFound | None, tensor: torch.Tensor) -> torch.Tensor:
    """Return a bias without what an ablation took out of it."""
    if ablation is None or ablation.basis is None:
        return tensor
    basis = ablation.basis
    return tensor - ablation.strength * (tensor @ basis.T) @ basis
