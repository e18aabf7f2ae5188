"""Directions of other tools: one reader a format, one place that chooses between them.

`read_direction` is what the pipeline calls for whatever a user gives as a direction. bake's own files
are read as ever; what comes from elsewhere is announced as it was understood, because writers disagree
on what a layer's number means and hardly any file names its site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.direction import (
    DEFAULT_SITE,
    SCALE_KEY,
    Direction,
    load_direction,
    own_scale,
    read_vectors,
)
from bake.errors import DirectionError
from bake.formats import arrays, autoencoders, gguf_reader, objects, pickles, rotalabs
from bake.formats.given import GivenVectors, shift_layers
from bake.resources import find_direction
from bake.sites import check_site

NATIVE = "bake's direction file"
Reader = Callable[[Path], GivenVectors]
READERS: dict[str, Reader] = {
    ".npy": arrays.read_npy,
    ".npz": arrays.read_npz,
    ".pt": pickles.read_pt,
    ".pth": pickles.read_pt,
    ".bin": pickles.read_pt,
    ".gguf": gguf_reader.read_gguf,
}
# For files whose names say nothing; an archive is told by what lies in it.
MAGIC: dict[bytes, Reader] = {b"GGUF": gguf_reader.read_gguf, b"\x93NUM": arrays.read_npy}


def read_direction(
    reference: Any,
    *,
    layer_offset: int | None = None,
    site: str | None = None,
    hidden_size: int | None = None,
) -> Direction:
    """Read a direction from a file of any known format, a folder, `FILE:TENSOR[INDEX]` or an object.

    layer_offset: added to every layer's number that the file has. site: overrides the file's.
    hidden_size: the model's, which tells an autoencoder's axes apart. What is not bake's own has
    `format` and `understood` in its metadata. Raises DirectionError in one line for what cannot be used.
    """
    if isinstance(reference, Direction):
        return reference if site is None else replace(reference, site=check_site(site))
    if site is not None:
        check_site(site)
    path = _native_path(reference)
    if path is not None and not layer_offset and site is None:
        return load_direction(path)
    given, origin = read_given(reference, layer_offset=layer_offset, hidden_size=hidden_size)
    return given.to_direction(origin, site)


def read_given(
    reference: Any, *, layer_offset: int | None = None, hidden_size: int | None = None
) -> tuple[GivenVectors, str]:
    """Return the vectors as they are stored, with their own lengths, and what to call their origin."""
    given, origin = _open(reference, hidden_size)
    vectors, notes = shift_layers(given.vectors, layer_offset or 0, origin)
    return replace(given, vectors=vectors, notes=[*given.notes, *notes]), origin


def fit_direction(
    direction: Direction,
    reference: Any,
    *,
    hidden_size: int,
    layer_count: int,
    layer_offset: int | None = None,
    site: str | None = None,
) -> tuple[Direction, list[str]]:
    """Hold a direction against a model; return it, and sentences on how its file was understood.

    An autoencoder's row is read again, because the hidden size tells which axis it lies along. Raises
    DirectionError for another width than the model's, and for layers that the model does not have.
    """
    if is_decoder(reference):
        direction = read_direction(
            reference, layer_offset=layer_offset, site=site, hidden_size=hidden_size
        )
    direction.select([], hidden_size)
    direction.check_layers(layer_count)
    path = _native_path(reference)
    notes = []
    if "understood" in direction.metadata:
        notes.append(f"direction understood as {direction.metadata['understood']}")
    elif path is not None and site is None and "site" not in read_vectors(path)[1]:
        notes.append(
            f"{path.name} names no site; {DEFAULT_SITE} is assumed (--direction-site to say another)"
        )
    return direction, notes


def is_decoder(reference: Any) -> bool:
    """Tell whether a reference is an autoencoder's row, which is read again when the model is known."""
    return _decoder(reference) is not None


def _open(reference: Any, hidden_size: int | None) -> tuple[GivenVectors, str]:
    if not isinstance(reference, (str, Path)):
        return objects.read_object(reference), type(reference).__name__
    decoder = _decoder(reference)
    path = decoder.path if decoder else find_direction(str(reference))
    try:
        if decoder is not None:
            return autoencoders.read_decoder(decoder, hidden_size), path.name
        if path.is_dir():
            return rotalabs.read_folder(path), path.name
        return _choose_reader(path)(path), path.name
    except OSError as error:
        raise DirectionError(f"{path} cannot be read: {error.strerror or error}") from None


def _decoder(reference: Any) -> autoencoders.DecoderReference | None:
    if not isinstance(reference, (str, Path)) or Path(reference).exists():
        return None
    return autoencoders.parse_reference(str(reference))


def _native_path(reference: Any) -> Path | None:
    """Return the path of a reference that bake's own reader takes; None for every other format."""
    if not isinstance(reference, (str, Path)) or is_decoder(reference):
        return None
    path = find_direction(str(reference))
    if path.is_dir() or (path.is_file() and _choose_reader(path) is not _read_native):
        return None
    return path


def _choose_reader(path: Path) -> Reader:
    """Return the reader for a file, by its name, else by its first bytes, else bake's own."""
    if not path.is_file():
        raise DirectionError(f"no direction file {path}; make one with bake direction")
    suffix = path.suffix.lower()
    if suffix in (".pt", ".json") and rotalabs.is_rotalabs(path):
        return rotalabs.read_pair
    if suffix in READERS:
        return READERS[suffix]
    if suffix == ".safetensors":
        return _read_native
    with path.open("rb") as stream:
        start = stream.read(4)
    if start[:2] == b"PK":
        return arrays.read_npz if arrays.npz_names(path) else pickles.read_pt
    return MAGIC.get(start, _read_native)


def _read_native(path: Path) -> GivenVectors:
    """Read bake's own file with its lengths: for another site or offset, and for conversion."""
    vectors, metadata = read_vectors(path)
    site = metadata.pop("site", None)
    if site is not None:
        check_site(site)
    for layer, length in own_scale(metadata, path).items():
        if layer in vectors:
            vectors[layer] = vectors[layer] * length
    metadata.pop(SCALE_KEY, None)
    return GivenVectors(NATIVE, vectors, site=site, metadata=metadata)


__all__ = ["fit_direction", "is_decoder", "read_direction", "read_given"]
