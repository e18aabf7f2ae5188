"""Heads and neurons by their numbers: which columns of which matrix each goes through.

The matrices are those that were found to write (`bake.anatomy.writes`). Attention lays its heads out one
after another before its output projection, in every architecture of transformers, whatever its queries,
keys and values are fused to; the proof compares with hooks on that projection's input.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bake.anatomy.choice import Anatomy
from bake.anatomy.flags import parameter_shapes
from bake.checkpoint.loading import build_on_meta
from bake.errors import BakeError, UnsupportedError
from bake.writes import Part, Silence, Write, WriteMap

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEAD, _NEURON = re.compile(r"(\d{1,6})\.(\d{1,6})"), re.compile(r"(\d{1,6}):(\d{1,9})")


def parse_parts(text: str, pattern: re.Pattern[str], example: str) -> tuple[tuple[int, int], ...]:
    """Return (layer, number) of each entry of a list; raise BakeError for what is none."""
    found = []
    for entry in (part.strip() for part in text.split(",")):
        match = pattern.fullmatch(entry)
        if match is None:
            raise BakeError(f"{entry!r} is not written as {example}, layers counted from 0")
        found.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def parse_heads(text: str) -> tuple[tuple[int, int], ...]:
    """Return (layer, head) of each entry of "10.5,10.7"."""
    return parse_parts(text, _HEAD, "LAYER.HEAD, such as 10.5")


def parse_neurons(text: str) -> tuple[tuple[int, int], ...]:
    """Return (layer, neuron) of each entry of "10:3072,10:17"."""
    return parse_parts(text, _NEURON, "LAYER:NEURON, such as 10:3072")


def find_parts(
    anatomy: Anatomy, heads: Sequence[tuple[int, int]], neurons: Sequence[tuple[int, int]]
) -> Silence:
    """Return the columns of heads and neurons.

    Raises UnsupportedError where a layer has no attention, or an MLP of several matrices, BakeError for a
    number that the model does not have.
    """
    writes = anatomy.ablation.choose(None, anatomy.model_type)
    shapes = parameter_shapes(build_on_meta(anatomy.config))
    count = getattr(anatomy.config.get_text_config(), "num_attention_heads", None)
    parts = []
    for layer, head in heads:
        write = _projection(anatomy, writes, shapes, layer, attention=True)
        width = _input_width(write, shapes)
        if not isinstance(count, int) or width % count:
            raise UnsupportedError(
                f"{write.parameter} reads {width} numbers, which are not {count} heads of one size"
            )
        _check_number(f"head {layer}.{head}", head, count)
        size = width // count
        parts.append(Part(f"{layer}.{head}", layer, write, (head * size, (head + 1) * size)))
    for layer, neuron in neurons:
        write = _projection(anatomy, writes, shapes, layer, attention=False)
        _check_number(f"neuron {layer}:{neuron}", neuron, _input_width(write, shapes))
        parts.append(Part(f"{layer}:{neuron}", layer, write, (neuron, neuron + 1)))
    named = tuple(f"{layer}.{head}" for layer, head in heads)
    return Silence(tuple(parts), named, tuple(f"{layer}:{neuron}" for layer, neuron in neurons))


def _projection(
    anatomy: Anatomy,
    writes: WriteMap,
    shapes: Mapping[str, tuple[int, ...]],
    layer: int,
    *,
    attention: bool,
) -> Write:
    """Return the matrix that attention, or the MLP, of a layer writes through."""
    if layer not in writes.by_layer:
        raise BakeError(
            f"layer {layer} is named; the model has layers 0 to {anatomy.layer_count - 1}"
        )
    block = anatomy.structure.at(layer).attention or ""
    inside = f"{writes.layers}.{layer}.{block}."
    found = [
        write
        for write in writes.by_layer[layer].writes
        if write.parameter.startswith(inside) == attention and write.parameter.endswith("weight")
    ]
    what = "attention" if attention else "the MLP"
    if attention and not re.search("attn|attention", block, re.IGNORECASE):
        raise UnsupportedError(f"layer {layer} has no attention, so it has no heads")
    if len(found) != 1 or len(shapes[found[0].parameter]) != 2:
        raise UnsupportedError(
            f"in layer {layer} {what} does not write through one matrix (experts, or blocks side by side)"
        )
    return found[0]


def _input_width(write: Write, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return shapes[write.parameter][-1 if write.axis == -2 else -2]


def _check_number(name: str, number: int, count: int) -> None:
    if number >= count:
        raise BakeError(f"{name} is named; that layer has 0 to {count - 1}")
