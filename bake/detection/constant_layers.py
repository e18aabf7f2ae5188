"""Layers that only add a constant, in a suspect without a base: it is compared with itself without them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bake.anatomy import examine
from bake.anatomy.base import Base
from bake.anatomy.insertion.growth import Place, config_from_text, grow_config
from bake.anatomy.insertion.layers_on_disk import LayersOnDisk, find_layers
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.ranged import RangedTensors
from bake.detection.alignment import PROBED_ROWS, align, compare
from bake.detection.findings import LAYERS, PushFound
from bake.detection.recovery import recover_pushes
from bake.errors import BakeError

if TYPE_CHECKING:
    import torch


def find_constant_layers(opened: Base, tensors: RangedTensors) -> list[PushFound]:
    """Return the push of layers that bake would have inserted after others; none where there are none.

    The push's layers are those of the model without them, after which they stand.
    """
    anatomy, checkpoint = opened.anatomy, opened.checkpoint
    try:
        disk = find_layers(checkpoint, anatomy.structure.layers, anatomy.layer_count)
        empty = find_empty(tensors, disk, anatomy.layer_count)
        if not empty or len(empty) == anatomy.layer_count:
            return []
        base = without_layers(opened, disk, empty)
    except BakeError:
        return []
    aligned = align(base, RangedTensors(base.checkpoint), opened, tensors)
    if aligned.inserted is None:
        return []
    own = {disk.name(layer, inside) for layer in empty for inside in disk.layers[layer]}
    compared = compare(tensors, aligned, frozenset({*checkpoint.tensors} - own))
    names = DiskNames(checkpoint, build_on_meta(anatomy.config))

    def old(_parameter: str, name: str) -> torch.Tensor | None:
        return aligned.readers[name](None).double() if name in aligned.readers else None

    pushes = recover_pushes(tensors, anatomy, names, old, aligned.inserted)
    held = {names.find(each) or each for push in pushes for each in push.parameters}
    if {*compared.changed, *compared.added} - held:
        return []  # They do more than that.
    return [replace(push, kind=LAYERS) for push in pushes if push.fits]


def find_empty(tensors: RangedTensors, disk: LayersOnDisk, count: int) -> list[int]:
    """Return the layers of which a matrix writes nothing that is something in most others.

    Of each matrix a few rows are looked at.
    """
    common = set.intersection(*(set(disk.layers[layer]) for layer in range(count)))
    parts = sorted(part for part in common if len(disk.layers[0][part].shape) == 2)
    largest = sorted(parts, key=lambda part: disk.layers[0][part].size)[-3:]
    tensors.prefetch((disk.name(n, part) for n in range(count) for part in largest), PROBED_ROWS)
    votes: Counter[int] = Counter()
    for part in largest:
        zero = [
            layer
            for layer in range(count)
            if not tensors.rows(disk.name(layer, part), PROBED_ROWS).any()
        ]
        if len(zero) < count:
            votes.update(zero)
    return sorted(votes)


def without_layers(opened: Base, disk: LayersOnDisk, dropped: Sequence[int]) -> Base:
    """Return a suspect as if layers were not in it: its headers and config, the rest renumbered.

    Raises UnsupportedError where its config cannot say that.
    """
    checkpoint = opened.checkpoint
    kept = [layer for layer in range(opened.anatomy.layer_count) if layer not in dropped]
    number = {layer: index for index, layer in enumerate(kept)}
    tensors = {}
    for name, entry in checkpoint.tensors.items():
        place = disk.split(name)
        if place is None:
            tensors[name] = entry
        elif place[0] in number:
            new = disk.name(number[place[0]], place[1])
            tensors[new] = replace(entry, name=new)
    places = [Place(layer) for layer in kept]
    changes = grow_config(
        opened.anatomy.config, places, opened.checkpoint.config, opened.anatomy.layer_count
    )
    text = edit_json(checkpoint.config_text, changes)
    smaller: Checkpoint = replace(
        checkpoint, tensors=tensors, config=json.loads(text), config_text=text
    )
    return Base(smaller, examine(config_from_text(text)))
