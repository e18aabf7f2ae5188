"""What a file of another tool turned out to hold, before it becomes a direction.

Every reader of this package ends here: vectors by layer with the lengths they were given, the site
where the file names one, and a sentence on how the file was understood. What is checked here is checked
for every format: dtypes, shapes, widths, zeros, NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bake.direction import DEFAULT_SITE, Direction, check_dtype, normalise_all
from bake.errors import DirectionError

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 100_000
UNIT_TOLERANCE = 1e-3  # half precision rounds a unit vector's length by up to this much

# Names that carry a layer's number: 12, layer_12, layers.12, direction.12, blocks.12, model.layers.12
_LAYER_NAME = re.compile(
    r"(?:(?:model\.|transformer\.)?(?:layers?|directions?|vectors?|blocks?|h)?[._-]?)?([0-9]{1,6})"
)


@dataclass(frozen=True)
class GivenVectors:
    """Vectors as a file holds them, (hidden_size,) each, by 0-based layer; None is for all layers.

    format: what the file is, in words. site: None where the file does not say. notes: what else was
    understood, in phrases. metadata: what the file knows of the vectors' origin.
    """

    format: str
    vectors: Mapping[int | None, torch.Tensor]
    site: str | None = None
    notes: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def describe(self, direction: Direction) -> str:
        """Return one line on what was understood: layers, width, lengths, site."""
        lengths = list(direction.lengths.values())
        low, high = min(lengths), max(lengths)
        if max(abs(low - 1), abs(high - 1)) <= UNIT_TOLERANCE:
            scale = "unit length"
        else:
            shortest, longest = f"{low:.4g}", f"{high:.4g}"
            scale = f"length {shortest}" + (f" to {longest}" if longest != shortest else "")
        count = len(lengths)
        covered = f"{count} vector{'s' * (count > 1)} of width {direction.hidden_size}"
        site = f"site {direction.site}" + (" (the file names none)" if self.site is None else "")
        return "; ".join(
            [f"{self.format}: {covered} for {name_layers(self.vectors)}", scale, site, *self.notes]
        )

    def to_direction(self, origin: str, site: str | None = None) -> Direction:
        """Return the direction, with `format` and `understood` in its metadata.

        site: overrides the file's. Raises DirectionError, naming the vector, for one that is unusable.
        """
        found = normalise_all(self.vectors, site or self.site or DEFAULT_SITE, {}, origin)
        story = {"format": self.format, "understood": self.describe(found)}
        return Direction(found.vectors, found.site, {**self.metadata, **story}, found.lengths)


def name_layers(vectors: Mapping[int | None, Any]) -> str:
    """Return which layers there are: "all layers", "layers 3 to 7", "layers 2, 5, 9"."""
    layers = sorted(layer for layer in vectors if layer is not None)
    if not layers:
        return "all layers"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    shown = ", ".join(str(layer) for layer in layers[:12])
    return f"layers {shown}" + (f" and {len(layers) - 12} more" if len(layers) > 12 else "")


def layer_number(name: Any) -> int | None:
    """Return the layer that a key names, 12 for 12, "12", "layer_12" or "direction.12"; else None."""
    if isinstance(name, int) and not isinstance(name, bool):
        return name if 0 <= name < MAX_LAYERS else None
    match = _LAYER_NAME.fullmatch(name) if isinstance(name, str) else None
    return int(match[1]) if match and int(match[1]) < MAX_LAYERS else None


def from_tensor(tensor: torch.Tensor, origin: str) -> dict[int | None, torch.Tensor]:
    """Return one array's vectors: (hidden_size,) is for all layers, (layers, hidden_size) a row each.

    Axes of length 1 do not count. Raises DirectionError for any other shape, and for an empty one.
    """
    check_dtype(tensor, origin)
    shape = tuple(tensor.shape)
    if 0 in shape or not shape:
        raise DirectionError(
            f"{origin} is empty (shape {shape}); a direction has hidden_size values"
        )
    squeezed = tensor.reshape([size for size in shape if size != 1] or [1])
    if squeezed.ndim == 1:
        return {None: squeezed}
    if squeezed.ndim > 2:
        raise DirectionError(
            f"{origin} has shape {shape}; give one vector (hidden_size,) or (layers, hidden_size)"
        )
    if squeezed.shape[0] > MAX_LAYERS:
        raise DirectionError(
            f"{origin} has shape {shape}, which is no (layers, hidden_size); a row of an "
            f"autoencoder's decoder is FILE:TENSOR[INDEX]"
        )
    return dict(enumerate(squeezed))


def from_mapping(
    entries: Mapping[Any, torch.Tensor], origin: str
) -> dict[int | None, torch.Tensor]:
    """Return the vectors of arrays by name: keys that are layers, or one array under any name.

    Raises DirectionError where several arrays have names that are no layers, or two mean one layer.
    """
    if not entries:
        raise DirectionError(f"{origin} holds no array; a direction file has at least one")
    numbers = {name: layer_number(name) for name in entries}
    unknown = [name for name, layer in numbers.items() if layer is None]
    if unknown and len(entries) == 1:
        return from_tensor(entries[unknown[0]], f"{origin}: {shorten(unknown[0])}")
    if unknown:
        raise DirectionError(
            f"{origin} names an array {shorten(unknown[0])}, which is no layer; name them by layer "
            f"(0, 1, … or layer_0, layer_1, …), or keep one array only"
        )
    if len(set(numbers.values())) < len(numbers):
        raise DirectionError(f"{origin} names a layer twice; keep one vector a layer")
    vectors: dict[int | None, torch.Tensor] = {}
    for name, tensor in entries.items():
        row = from_tensor(tensor, f"{origin}: {shorten(name)}")
        if None not in row:
            raise DirectionError(
                f"{origin}: {shorten(name)} has shape {tuple(tensor.shape)}; a layer has one vector"
            )
        vectors[numbers[name]] = row[None]
    return dict(sorted(vectors.items(), key=lambda item: item[0] or 0))


def shift_layers(
    vectors: Mapping[int | None, torch.Tensor], offset: int, origin: str
) -> tuple[dict[int | None, torch.Tensor], list[str]]:
    """Return the vectors with `offset` added to every layer, and what there is to say about it.

    A vector whose layer comes out negative is left out, and said: the embeddings' row of an array in
    the order of `hidden_states`. Raises DirectionError where none is left.
    """
    if None in vectors or not offset:
        return dict(vectors), []
    numbered = {layer + offset: vector for layer, vector in vectors.items() if layer is not None}
    kept: dict[int | None, torch.Tensor] = {n: v for n, v in numbered.items() if n >= 0}
    if not kept:
        raise DirectionError(
            f"{origin}: --layer-offset {offset} leaves no layer; the file has {name_layers(vectors)}"
        )
    notes = [f"layer numbers moved by {offset:+d}, as asked"]
    lost = len(numbered) - len(kept)
    if lost:
        notes.append(f"{lost} left out, before layer 0")
    return kept, notes


def shorten(name: Any) -> str:
    """Return a key for a message: at most 60 characters, one line."""
    text = repr(name)
    return text if len(text) <= 60 else text[:57] + "…'"


def printable(value: Any) -> str:
    """Return what a file says of itself as one short line of text."""
    return "".join(character for character in str(value)[:200] if character.isprintable())
