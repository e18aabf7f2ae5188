"""Decoder layers on disk: which tensors belong to which layer, whatever the path is called there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bake.checkpoint.checkpoint import Checkpoint
from bake.errors import CheckpointError
from bake.io.safetensors import TensorEntry

_OTHER_TOWERS = re.compile(r"vision|visual|audio|speech|image|encoder|mtp")


@dataclass(frozen=True)
class LayersOnDisk:
    """The tensors of every decoder layer by their names inside the layer.

    prefix: what the names on disk begin with, before the layer's number. layers: {number: {name inside
    the layer: entry}}; more than the model has where the checkpoint carries layers that no model
    reads (multi-token prediction).
    """

    prefix: str
    layers: Mapping[int, Mapping[str, TensorEntry]]

    def name(self, layer: int, inside: str) -> str:
        """Return the full name on disk."""
        return f"{self.prefix}.{layer}.{inside}"

    def split(self, name: str) -> tuple[int, str] | None:
        """Return (layer, name inside it) of a tensor; None where it belongs to no layer."""
        if not name.startswith(f"{self.prefix}."):
            return None
        number, _, inside = name[len(self.prefix) + 1 :].partition(".")
        return (int(number), inside) if number.isdigit() and inside else None


def find_layers(checkpoint: Checkpoint, path: str, count: int) -> LayersOnDisk:
    """Find the decoder layers. path: of their list in the model; count: how many it has.

    Raises CheckpointError where the tensors of a layer are not there.
    """
    leaf = path.rpartition(".")[2]
    pattern = re.compile(rf"((?:.*\.)?{re.escape(leaf)})\.(\d+)\.(.+)")
    found: dict[str, dict[int, dict[str, TensorEntry]]] = {}
    for name, entry in checkpoint.tensors.items():
        match = pattern.fullmatch(name)
        if match and (_OTHER_TOWERS.search(path) or not _OTHER_TOWERS.search(match[1])):
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = entry
    complete = [prefix for prefix, layers in found.items() if set(range(count)) <= set(layers)]
    if not complete:
        raise CheckpointError(
            f"{checkpoint.model_id} has no tensors of {count} decoder layers under {path} or a "
            f"shorter name; is the checkpoint complete?"
        )
    prefix = max(complete, key=lambda prefix: _common_ending(prefix, path))
    return LayersOnDisk(prefix, found[prefix])


def _common_ending(left: str, right: str) -> int:
    """Return how many dotted parts two paths share at their ends."""
    shared = 0
    for one, other in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if one != other:
            break
        shared += 1
    return shared
