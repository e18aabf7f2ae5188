"""A direction's file: safetensors with one unit vector, or one a layer, and metadata of what is known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.errors import CheckpointError, DirectionError
from bake.io.foreign_json import parse_json
from bake.io.safetensors import (
    Header,
    decode_tensor,
    encode_header,
    encode_tensor,
    read_header,
    read_range,
    spec_of,
)
from bake.sites import SITES
from bake.support.text import one_line

if TYPE_CHECKING:
    import torch
from bake.directions.direction import _LAYER_KEY, DEFAULT_SITE, SCALE_KEY, Direction, normalise_all

# Bounds on a file's metadata. The figures are JSON, and have some hundred characters a layer.
MAX_KEYS = 64


MAX_KEY = 100  # characters


MAX_TEXT = 2000


MAX_FIGURES = 1_000_000


MAX_NAMES = 20_000  # of tensors or of metadata, in one file


OWN_FIGURES = ("scale", "separation", "optimization")


OWN_KEYS = (
    *OWN_FIGURES,
    "site",
    "model",
    "method",
    "token",
    "pairs",
    "format",
    "understood",
    "parts",
)


def load_direction(path: Path) -> Direction:
    """Read a direction file. Raises DirectionError naming the file and what is wrong with it."""
    if not path.is_file():
        raise DirectionError(f"no direction file {path}; make one with bake direction")
    vectors, metadata = read_vectors(path)
    site = metadata.pop("site", DEFAULT_SITE)
    if site not in SITES:
        raise DirectionError(f"{path} names an unknown site {site!r}; one of {', '.join(SITES)}")
    direction = normalise_all(vectors, site, metadata, path.name)
    return replace(direction, lengths={**direction.lengths, **own_scale(metadata, path)})


def own_scale(metadata: Mapping[str, str], path: Path) -> dict[int | None, float]:
    """Return the lengths that an optimised direction's metadata has for its unit vectors.

    Raises DirectionError, naming the file, for what are no lengths.
    """
    if SCALE_KEY not in metadata:
        return {}
    try:
        said = parse_json(metadata[SCALE_KEY], SCALE_KEY, error=DirectionError)
        lengths = {
            None if layer == "all" else int(layer): float(length) for layer, length in said.items()
        }
        if not all(0 < length < math.inf for length in lengths.values()):
            raise ValueError("a length is a number above 0")
        return lengths
    except (DirectionError, ValueError, TypeError, OverflowError):
        raise DirectionError(
            f"{path}: its metadata {SCALE_KEY!r} is not lengths by layer; find the direction again"
        ) from None


def read_vectors(path: Path) -> tuple[dict[int | None, torch.Tensor], dict[str, str]]:
    """Return a direction file's vectors as they are stored, and its metadata with its site, if any.

    Raises DirectionError for what is no direction file; the vectors themselves are not looked at.
    """
    header = open_header(path)
    try:
        vectors: dict[int | None, torch.Tensor] = {}
        for entry in header.tensors:
            match = _LAYER_KEY.fullmatch(entry.name)
            if entry.name == "direction" or match:
                data = read_range(path, entry.start, entry.end)
                vectors[int(match[1]) if match else None] = decode_tensor(
                    data, entry.dtype, entry.shape
                )
    except CheckpointError as error:
        raise _no_direction(path, error) from None
    if not vectors:
        raise DirectionError(
            f"{path} holds no tensor named direction or direction.<layer>; is it a direction file?"
        )
    if None in vectors and len(vectors) > 1:
        raise DirectionError(f"{path} holds both one direction for all layers and some per layer")
    return vectors, bound_metadata(header.metadata, path.name)


def open_header(path: Path) -> Header:
    """Return the header of a safetensors file that should hold a direction.

    Raises DirectionError where it is no sound one, or names far more than a direction has.
    """
    try:
        header = read_header(path, path.name)
    except CheckpointError as error:
        raise _no_direction(path, error) from None
    for count, kind in ((len(header.tensors), "tensors"), (len(header.metadata), "metadata keys")):
        if count > MAX_NAMES:
            raise DirectionError(
                f"{path} is not a direction: it has {count} {kind}, where one has a few hundred"
            )
    return header


def _no_direction(path: Path, error: CheckpointError) -> DirectionError:
    reason = str(error).removeprefix(f"{path} is not a sound safetensors file: ")
    return DirectionError(f"{path} is not a safetensors file of a direction: {reason}")


def bound_metadata(metadata: Mapping[str, str], origin: str) -> dict[str, str]:
    """Return what is kept of a file's metadata: what bake itself writes, and some of what others do.

    Strings of strangers go into files and messages: at most MAX_KEYS of them, one line each, cut to
    MAX_TEXT characters. Raises DirectionError for figures of bake's that are longer than it writes.
    """
    kept: dict[str, str] = {}
    for key in sorted(metadata, key=lambda key: (key not in OWN_KEYS, key)):
        text = metadata[key]
        if key in OWN_FIGURES:
            if len(text) > MAX_FIGURES:
                raise DirectionError(
                    f"{origin}: its metadata {key!r} has {len(text)} characters, more than bake writes; "
                    f"find the direction again"
                )
            kept[key] = text
        elif len(kept) < MAX_KEYS and len(key) <= MAX_KEY and key.isprintable():
            kept[key] = one_line(text, MAX_TEXT)
    return kept


def hash_vectors(vectors: Mapping[int, torch.Tensor]) -> str:
    """Return the SHA-256 of {layer: unit vector}: the same for a direction however it was given."""
    digest = hashlib.sha256()
    for layer in sorted(vectors):
        digest.update(layer.to_bytes(4, "little"))
        digest.update(encode_tensor(vectors[layer].float()))
    return digest.hexdigest()


def direction_bytes(direction: Direction) -> bytes:
    """Return the direction file's bytes; the same direction always gives the same bytes."""
    tensors = {
        "direction" if layer is None else f"direction.{layer}": direction.vectors[layer].float()
        for layer in sorted(direction.vectors, key=lambda layer: -1 if layer is None else layer)
    }
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    header = encode_header(specs, {**direction.metadata, "site": direction.site})
    return header + b"".join(encode_tensor(tensor) for tensor in tensors.values())
