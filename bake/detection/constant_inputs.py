"""Per-layer inputs that hold a push and nothing else, as `bake.anatomy.hosts.gemma4` writes them."""

from __future__ import annotations

import re

from bake.checkpoint.ranged import RangedTensors
from bake.detection.findings import PushFound

_LAYER = re.compile(r"(.*\.(\d+)\.)per_layer_projection\.weight$")


def find_constant_inputs(tensors: RangedTensors) -> list[PushFound]:
    """Return the push of a suspect whose per-layer inputs add a constant, none where they say something.

    A layer adds norm(P · …) to the residual stream. Where all rows of P are alike, all channels of its
    output are, and what is added is the norm's weight times one number, whatever the text: 1 or −1 by the
    sign of the sum, which a bake makes positive.
    """
    import torch

    places = {
        int(match[2]): match[1]
        for name in tensors.checkpoint.tensors
        if (match := _LAYER.search(name))
    }
    if not places:
        return []
    first = f"{places[min(places)]}per_layer_projection.weight"
    rows = tensors.rows(first, 2)
    if not bool(rows.any()) or not torch.equal(rows, rows[:1].expand_as(rows)):
        return []
    vectors, parameters = {}, []
    for layer, place in sorted(places.items()):
        name = f"{place}post_per_layer_input_norm.weight"
        if name not in tensors.checkpoint.tensors:
            continue
        weight = tensors.read(name).double()
        factor = tensors.checkpoint.tensors.get(f"{place}layer_scalar")
        if factor is not None and factor.shape in ((), (1,)):
            weight = weight * tensors.read(factor.name).double()
        if weight.ndim == 1 and bool(weight.any()) and bool(weight.isfinite().all()):
            vectors[layer] = weight
            parameters.append(name)
    if not vectors:
        return []
    residuals = dict.fromkeys(vectors, 0.0)
    return [PushFound("mlp_out", "write", vectors, residuals, tuple(parameters))]
