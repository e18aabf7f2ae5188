"""Whose direction it is: cosines with given ones, and their coefficients in a sum of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bake.detection.findings import PushFound
from bake.directions.direction import Direction
from bake.directions.formats import fit_direction, read_direction
from bake.errors import DirectionError
from bake.support.progress import announce

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".safetensors", ".gguf", ".npy", ".npz", ".pt")


def read_known(paths: Sequence[str], hidden_size: int, layer_count: int) -> dict[str, Direction]:
    """Read the directions of files and folders, by name; one of another width is left out, and said so.

    Raises DirectionError for a file that cannot be read, and where nothing is left.
    """
    files: list[str] = []
    for path in paths:
        folder = Path(path).expanduser()
        if folder.is_dir():
            files += sorted(str(each) for each in folder.iterdir() if each.suffix in _SUFFIXES)
        else:
            files.append(path)
    found: dict[str, Direction] = {}
    for file in files:
        try:
            direction, _ = fit_direction(
                read_direction(file), file, hidden_size=hidden_size, layer_count=layer_count
            )
        except DirectionError as error:
            if len(files) == 1:
                raise
            announce(f"left out: {error}")
            continue
        name = Path(file).stem
        found[name if name not in found else file] = direction
    if paths and not found:
        raise DirectionError(f"none of {', '.join(paths)} holds a direction of this model's width")
    return found


def compare_with(
    push: PushFound, known: Mapping[str, Direction]
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Return ({name: {layer: cosine}}, {name: its coefficient in the sum that comes nearest}).

    Coefficients are means over layers, as shares of the push's length, by least squares over all of them.
    """
    import torch

    cosines: dict[str, dict[int, float]] = {name: {} for name in known}
    shares: dict[str, list[float]] = {name: [] for name in known}
    for layer, vector in push.vectors.items():
        held: dict[str, torch.Tensor] = {
            name: direction.layer(layer).double()
            for name, direction in known.items()
            if None in direction.vectors or layer in direction.vectors
        }
        if not held:
            continue
        for name, unit in held.items():
            cosines[name][layer] = float(vector @ unit / vector.norm())
        stacked = torch.stack(list(held.values()), dim=1)
        solved = torch.linalg.lstsq(stacked, vector[:, None], driver="gelsd").solution[:, 0]
        for name, value in zip(held, solved.tolist(), strict=True):
            shares[name].append(value / float(vector.norm()))
    return (
        {name: row for name, row in cosines.items() if row},
        {name: sum(values) / len(values) for name, values in shares.items() if values},
    )
