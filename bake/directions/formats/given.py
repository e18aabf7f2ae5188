"""What a file of another tool turned out to hold, before it becomes a direction.

Every reader of this package ends here: vectors by layer with the lengths they were given, the site
where the file names one, and a sentence on how the file was understood. What is checked here is checked
for every format: dtypes, shapes, widths, zeros, NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bake.directions.direction import (
    DEFAULT_SITE,
    Direction,
    check_dtype,
    describe_absent,
    normalise_all,
)
from bake.directions.formats.declared import Declared, read_declared
from bake.directions.formats.places import EMBEDDING, MAX_LAYERS, MAX_NAME, Place, parse_place
from bake.errors import DirectionError

if TYPE_CHECKING:
    import torch

UNIT_TOLERANCE = 1e-3  # half precision rounds a unit vector's length by up to this much
MAX_VALUES = 2**27  # of one array: 512 MB in float32, where the largest models' layers take 8
SHOWN_NAMES = 6
# Names that mean the vectors where a file has several arrays and none is named by a layer.
_VECTORS = re.compile(r"(?:^|[._-])(?:directions?|vectors?|diffs?|differences?|dirs?|v)$")
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.|$)")


@dataclass(frozen=True)
class Pick:
    """POSITION of `FILE[POSITION]`, counted from the end below 0; layer_count is the model's, if known."""

    position: int
    layer_count: int | None = None


@dataclass(frozen=True)
class Array:
    """One array of a file, before it is read. real: whether its values are real numbers."""

    shape: tuple[int, ...]
    real: bool
    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Array:
        """Return the entry of a tensor that is in memory."""
        return Array(tuple(tensor.shape), tensor.dtype.is_floating_point, lambda: tensor)


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
        left_out = describe_absent(direction)
        return "; ".join(
            [
                f"{self.format}: {covered} for {name_layers(direction.vectors)}",
                scale,
                site,
                *([left_out] if left_out else []),
                *self.notes,
            ]
        )

    def to_direction(self, origin: str, site: str | None = None) -> Direction:
        """Return the direction, with `format` and `understood` in its metadata.

        site: overrides the file's. Raises DirectionError, naming the vector, for one that is unusable.
        """
        found = normalise_all(self.vectors, site or self.site or DEFAULT_SITE, {}, origin)
        summary = {"format": self.format, "understood": self.describe(found)}
        return replace(found, metadata={**self.metadata, **summary})


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


def from_tensor(
    tensor: torch.Tensor, origin: str, pick: Pick | None = None
) -> tuple[dict[int | None, torch.Tensor], list[str]]:
    """Return one array's vectors, and phrases on how it was read.

    (hidden_size,) is for all layers, (layers, hidden_size) a row each; of (positions, layers,
    hidden_size) one position is picked. Axes of length 1 do not count. Raises DirectionError for any
    other shape, and for an empty one.
    """
    check_dtype(tensor, origin)
    _check_filled(tuple(tensor.shape), origin)
    notes: list[str] = []
    if pick is not None:
        tensor, note = _pick_position(tensor, pick, origin)
        notes.append(note)
    shape = tuple(tensor.shape)
    squeezed = tensor.reshape([size for size in shape if size != 1] or [1])
    if squeezed.ndim == 1:
        return {None: squeezed}, notes
    if squeezed.ndim > 2:
        remedy = (
            f", or one position of (positions, layers, hidden_size) as FILE[0] to FILE[{shape[0] - 1}]"
            if squeezed.ndim == 3 and pick is None
            else ""
        )
        raise DirectionError(
            f"{origin} has shape {shape}; give one vector (hidden_size,) or (layers, hidden_size){remedy}"
        )
    if squeezed.shape[0] > MAX_LAYERS:
        raise DirectionError(
            f"{origin} has shape {shape}, which is no (layers, hidden_size); a row of an "
            f"autoencoder's decoder is FILE:TENSOR[INDEX]"
        )
    return dict(enumerate(squeezed)), notes


def _check_filled(shape: tuple[int, ...], origin: str) -> None:
    if 0 in shape or not shape:
        raise DirectionError(
            f"{origin} is empty (shape {shape}); a direction has hidden_size values"
        )


def _pick_position(tensor: torch.Tensor, pick: Pick, origin: str) -> tuple[torch.Tensor, str]:
    shape, position = tuple(tensor.shape), pick.position
    if len(shape) != 3:
        raise DirectionError(
            f"{origin} has shape {shape}, which has no positions; FILE[POSITION] is for (positions, "
            f"layers, hidden_size)"
        )
    count, layers, _ = shape
    if not -count <= position < count:
        raise DirectionError(
            f"{origin} has shape {shape}, so positions 0 to {count - 1}; there is no {position}"
        )
    if pick.layer_count is not None and count == pick.layer_count != layers:
        raise DirectionError(
            f"{origin} has shape {shape} and the model has {count} layers, so its first axis is the "
            f"layers'; save it as (positions, layers, hidden_size)"
        )
    note = (
        f"position {position} of {shape} read as (positions, layers, hidden_size) (refusal-direction's "
        f"are of the layers' inputs: --layer-offset -1 uses them where they were found)"
    )
    return tensor[position], note


def gather(
    kind: str,
    arrays: Mapping[Any, Array],
    fields: Mapping[Any, Any],
    origin: str,
    pick: Pick | None = None,
    *,
    site: str | None = None,
    notes: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> GivenVectors:
    """Return the vectors of arrays by name: names that are layers or places, or one array by any name.

    kind: what the file is, in words. fields: what stands beside the arrays (see `declared`).
    Arrays of other names are ignored, and the notes say so. Raises DirectionError where it is not clear
    which array is meant, where two mean one layer, and for fields or names of what bake does not add.
    """
    declared = read_declared(fields, origin)
    if not arrays:
        raise DirectionError(f"{origin} holds no array; a direction file has at least one")
    _refuse_adapter(arrays, origin)
    places = {name: parse_place(name) for name in arrays}
    usable = {name: place for name, place in places.items() if place and not place.unknown}
    if usable:
        chosen = set(usable)
        vectors, found, more = _read_placed(usable, arrays, origin, pick)
    else:
        found = None
        name = _choose_one(arrays, places, origin)
        chosen = {name}
        vectors, more = from_tensor(
            _read(arrays[name], name, origin), f"{origin}: {shorten(name)}", pick
        )
        vectors, numbered = _number(vectors, declared, f"{origin}: {shorten(name)}")
        more += numbered
    ignored = [name for name in arrays if name not in chosen]
    if ignored:
        listed = ", ".join(shorten(name) for name in ignored[:SHOWN_NAMES])
        behind = f" and {len(ignored) - SHOWN_NAMES} more" if len(ignored) > SHOWN_NAMES else ""
        more.append(f"other arrays ignored: {listed}{behind}")
    said = {value for value in (declared.site, found) if value is not None}
    if len(said) > 1:
        raise DirectionError(
            f"{origin} says site {declared.site} and names its arrays by {found}; correct its fields"
        )
    return GivenVectors(
        kind,
        vectors,
        site=said.pop() if said else site,
        notes=[*notes, *declared.notes, *more],
        metadata=metadata or {},
    )


def _read(array: Array, name: Any, origin: str) -> torch.Tensor:
    """Read an array, if it is no larger than a direction of any model."""
    if math.prod(array.shape) > MAX_VALUES:
        raise DirectionError(
            f"{origin}: {shorten(name)} has shape {array.shape[:6]}, more values than a direction of any "
            f"model has; a row of an autoencoder's decoder is FILE:TENSOR[INDEX]"
        )
    return array.read()


def _read_placed(
    places: Mapping[Any, Place], arrays: Mapping[Any, Array], origin: str, pick: Pick | None
) -> tuple[dict[int | None, torch.Tensor], str | None, list[str]]:
    """Return the vectors of arrays that are named by layer, their site where names say it, and notes."""
    sites = sorted({place.site for place in places.values() if place.site is not None})
    if len(sites) > 1:
        raise DirectionError(
            f"{origin} holds vectors of several sites ({', '.join(sites)}); keep those of one"
        )
    early = [name for name, place in places.items() if place.layer == EMBEDDING]
    kept = {name: place.layer for name, place in places.items() if place.layer != EMBEDDING}
    notes = [f"left out before layer 0, the embedding: {shorten(early[0])}"] if early else []
    if not kept:
        raise DirectionError(
            f"{origin} holds {shorten(early[0])} only, which is the embedding and no layer's output; "
            f"give vectors of layers"
        )
    if len(set(kept.values())) < len(kept):
        raise DirectionError(f"{origin} names a layer twice; keep one vector a layer")
    if len(kept) > MAX_LAYERS:
        raise DirectionError(f"{origin} has {len(kept)} layers, more than any model")
    vectors: dict[int | None, torch.Tensor] = {}
    for name, layer in kept.items():
        where = f"{origin}: {shorten(name)}"
        row, picked = from_tensor(_read(arrays[name], name, origin), where, pick)
        if None not in row:
            raise DirectionError(f"{where} has shape {arrays[name].shape}; a layer has one vector")
        vectors[layer] = row[None]
        notes += [note for note in picked if note not in notes]
    notes += dict.fromkeys(
        place.meaning for place in places.values() if place.layer in vectors and place.meaning
    )
    return (
        dict(sorted(vectors.items(), key=lambda item: item[0] or 0)),
        next(iter(sites), None),
        notes,
    )


def _choose_one(
    arrays: Mapping[Any, Array], places: Mapping[Any, Place | None], origin: str
) -> Any:
    """Return the name of the one array that can be the direction, of arrays that name no layer."""
    elsewhere = [name for name, place in places.items() if place is not None]
    if elsewhere:
        raise DirectionError(
            f"{origin} names an array {shorten(elsewhere[0])}, which is none of bake's sites; it knows "
            f"resid_post, resid_pre, resid_mid, mlp_out, attn_out, mlp, self_attn and the layer's output"
        )
    if len(arrays) == 1:
        return next(iter(arrays))
    real = {
        name: array for name, array in arrays.items() if array.real and math.prod(array.shape) > 1
    }
    named = [name for name in real if _VECTORS.search(str(name).lower()[-MAX_NAME:])]
    if len(named) == 1:
        return named[0]
    candidates = {name: real[name] for name in named} or real
    tallest = max((len(array.shape) for array in candidates.values()), default=0)
    tall = [name for name, array in candidates.items() if len(array.shape) == tallest]
    if len(tall) == 1 and (len(candidates) == 1 or tallest > 1):
        width = candidates[tall[0]].shape[-1]
        if all(array.shape[-1] != width for name, array in candidates.items() if name != tall[0]):
            return tall[0]
    raise DirectionError(
        f"{origin} names an array {shorten(next(iter(candidates or arrays)))}, which is no layer; name "
        f"them by layer (0, 1, … or layer_0, layer_1, …), or keep one array only"
    )


def _number(
    vectors: dict[int | None, torch.Tensor], declared: Declared, origin: str
) -> tuple[dict[int | None, torch.Tensor], list[str]]:
    """Return the vectors of one array by the layers that the file's fields say, where they do."""
    layer, layers = declared.layer, declared.layers
    if None in vectors:
        if layer == EMBEDDING:
            raise DirectionError(
                f"{origin} is of the embedding and of no layer's output; give vectors of layers"
            )
        listed = (layer,) if layer is not None else layers
        return (dict.fromkeys(listed, vectors[None]) or vectors), []
    if not layers:
        return vectors, []
    if len(set(layers)) != len(vectors) or len(layers) != len(vectors):
        raise DirectionError(
            f"{origin} has {len(vectors)} rows and the file lists {len(layers)} layers; a row is one layer"
        )
    rows = dict(zip(layers, vectors.values(), strict=True))
    numbered: dict[int | None, torch.Tensor] = {number: rows[number] for number in sorted(rows)}
    return numbered, ["rows by the layers that the file lists"]


def _refuse_adapter(names: Iterable[Any], origin: str) -> None:
    if any(isinstance(name, str) and _ADAPTER.search(name[:MAX_NAME]) for name in names):
        raise DirectionError(
            f"{origin} is a PEFT adapter (LoRA weights) and no direction; merge it into the model, and "
            f"give the merged model to bake"
        )


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
