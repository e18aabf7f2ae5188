"""Directions that are Python objects: a steering-vectors `SteeringVector`, a mapping, a tensor, an array.

Nothing is imported for them: an object that has `layer_activations`, {layer: (hidden_size,)}, is one of
that library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.directions.formats.given import Array, GivenVectors, from_tensor, gather, shorten
from bake.directions.formats.places import parse_place
from bake.errors import DirectionError
from bake.io.work_directory import temporary_directory

if TYPE_CHECKING:
    import torch

# steering-vectors' layer types → where bake adds to the same thing. What the MLP adds to the residual
# stream reaches the layer's output unchanged, so its output and the layer's are one site.
SITES_BY_LAYER_TYPE = {
    "decoder_block": "mlp_out",
    "mlp": "mlp_out",
    "self_attn": "attn_out",
    "input_layernorm": "attn_in",
    "post_attention_layernorm": "mlp_in",
}


_PLAIN = (str, bool, int, float)


def read_object(value: Any) -> GivenVectors:
    """Read an object of another library, {layer: vector}, or one array.

    Raises DirectionError for anything else, naming its type.
    """
    name = type(value).__name__
    if isinstance(getattr(value, "layer_activations", None), Mapping):
        return _read_steering_vector(value, name)
    if isinstance(value, Mapping):
        return gather("a mapping", *_take_apart(value, name), name)
    vectors, notes = from_tensor(_as_tensor(value, name), name)
    return GivenVectors(f"a {name}", vectors, notes=notes)


@contextmanager
def given_as_file(value: Any) -> Iterator[str | list[str] | None]:
    """Yield what a recipe can hold: paths as they are, an object as a temporary direction file.

    The file keeps the vectors' own lengths and how the object was understood.
    """
    if value is None or isinstance(value, (str, Path)):
        yield None if value is None else str(value)
        return
    if isinstance(value, list | tuple) and value and all(isinstance(v, str | Path) for v in value):
        yield [str(entry) for entry in value]
        return
    if not isinstance(value, Direction):
        value = read_object(value).to_direction(type(value).__name__)
    with temporary_directory("bake-direction-") as folder:
        path = folder / "direction.safetensors"
        path.write_bytes(direction_bytes(with_lengths(value)))
        yield str(path)


def with_lengths(direction: Direction) -> Direction:
    """Return the direction with its vectors as long as they were given, which a file then holds."""
    vectors = {
        layer: (vector.double() * direction.lengths.get(layer, 1.0)).float()
        for layer, vector in direction.vectors.items()
    }
    return replace(direction, vectors=vectors)


def _read_steering_vector(value: Any, name: str) -> GivenVectors:
    layer_type = str(getattr(value, "layer_type", "decoder_block"))
    if layer_type not in SITES_BY_LAYER_TYPE:
        raise DirectionError(
            f"the {name} is of layer type {shorten(layer_type)}; bake knows "
            f"{', '.join(SITES_BY_LAYER_TYPE)}"
        )
    arrays, fields = _take_apart(value.layer_activations, name)
    own = {
        key: entry
        for key, entry in getattr(value, "__dict__", {}).items()
        if isinstance(entry, _PLAIN) and key != "layer_type"
    }
    return gather(
        f"steering-vectors {name}",
        arrays,
        {**fields, **own},
        name,
        site=SITES_BY_LAYER_TYPE[layer_type],
        notes=[f"layer type {layer_type}"],
    )


def _take_apart(values: Mapping[Any, Any], name: str) -> tuple[dict[Any, Array], dict[Any, Any]]:
    """Return a mapping's arrays, and the plain values that stand beside them."""
    fields = {
        key: item
        for key, item in values.items()
        if isinstance(item, _PLAIN) and parse_place(key) is None
    }
    arrays = {
        key: Array.of(_as_tensor(item, f"{name}: {shorten(key)}"))
        for key, item in values.items()
        if key not in fields
    }
    return arrays, fields


def _as_tensor(value: Any, name: str) -> torch.Tensor:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu").to_dense()
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError, RuntimeError):
        raise DirectionError(
            f"{name} is a {type(value).__name__}, which is no direction; give a file, a tensor, "
            f"{{layer: tensor}}, or an object with layer_activations"
        ) from None
