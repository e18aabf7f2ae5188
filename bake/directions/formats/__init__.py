"""Directions of other tools: one reader a format, one place that chooses between them.

`read_direction` is what the pipeline calls for whatever a user gives as a direction. bake's own files
are read as ever; what comes from elsewhere is announced as it was understood, because writers disagree
on what a layer's number means and hardly any file names its site.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.directions.direction import (
    DEFAULT_SITE,
    SCALE_KEY,
    Direction,
    check_fit,
    describe_absent,
)
from bake.directions.direction_file import load_direction, open_header, own_scale, read_vectors
from bake.directions.formats import (
    arrays,
    autoencoders,
    gguf_reader,
    objects,
    pickles,
    rotalabs,
    safetensors_reader,
)
from bake.directions.formats.declared import read_declared
from bake.directions.formats.given import GivenVectors, Pick, shift_layers
from bake.errors import DirectionError
from bake.io.foreign_paths import expand_user
from bake.io.git_lfs import check_pointer
from bake.io.shipped import find_direction
from bake.sites import check_site

NATIVE = "bake's direction file"
Reader = Callable[[Path, Pick | None], GivenVectors]
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
# FILE[POSITION]: a file of (positions, layers, hidden_size).
_POSITION = re.compile(r"(?P<file>.+)\[(?P<position>-?[0-9]{1,6})\]")


def read_direction(
    reference: Any,
    *,
    layer_offset: int | None = None,
    site: str | None = None,
    hidden_size: int | None = None,
    layer_count: int | None = None,
) -> Direction:
    """Read a direction from a file of any known format, a folder, part of a file, or an object.

    Parts are `FILE:TENSOR[INDEX]`, an autoencoder's row, and `FILE[POSITION]`, of (positions, layers, d).
    layer_offset: added to every layer's number that the file has. site: overrides the file's.
    hidden_size and layer_count: the model's, which tell an array's axes apart. What is not bake's own has
    `format` and `understood` in its metadata. Raises DirectionError in one line for what cannot be used.
    """
    if isinstance(reference, Direction):
        return reference if site is None else replace(reference, site=check_site(site))
    if site is not None:
        check_site(site)
    path = _native_path(reference)
    if path is not None and not layer_offset and site is None:
        _check_own_words(path)
        return load_direction(path)
    given, origin = read_given(
        reference, layer_offset=layer_offset, hidden_size=hidden_size, layer_count=layer_count
    )
    return given.to_direction(origin, site)


def read_given(
    reference: Any,
    *,
    layer_offset: int | None = None,
    hidden_size: int | None = None,
    layer_count: int | None = None,
) -> tuple[GivenVectors, str]:
    """Return the vectors as they are stored, with their own lengths, and what to call their origin."""
    given, origin = _open(reference, hidden_size, layer_count)
    vectors, notes = shift_layers(given.vectors, layer_offset or 0, origin)
    return replace(given, vectors=vectors, notes=[*given.notes, *notes]), origin


def check_width(reference: Any, hidden_size: int | None) -> None:
    """Raise DirectionError for a file whose vectors are of another width than the model's.

    A size of None fits everything. Of bake's own files only the header is read, without torch; an
    autoencoder's row and a position of an array wait for the model, whose sizes tell their axes apart.
    Raises DirectionError also for a file that cannot be read.
    """
    if not isinstance(reference, (str, Path)) or _decoder(reference) or _position(reference):
        return
    path = _native_path(reference)
    if path is not None:
        _choose_reader(path)  # Which says where there is no such file.
    if path is None:
        vectors = read_given(reference)[0].vectors
        shapes, metadata = [tuple(vector.shape) for vector in vectors.values()], {}
    else:
        header = open_header(path)
        shapes, metadata = [entry.shape for entry in header.tensors], dict(header.metadata)
    for shape in shapes:
        if hidden_size is not None and shape:
            check_fit(shape[-1], hidden_size, metadata)


def fit_direction(
    direction: Direction,
    reference: Any,
    *,
    hidden_size: int,
    layer_count: int,
    layer_offset: int | None = None,
    site: str | None = None,
) -> tuple[Direction, list[str]]:
    """Fit a direction to a model; return it, and sentences on how its file was understood.

    An autoencoder's row and one position of an array are read again, because the model's sizes tell
    their axes apart. Raises DirectionError for another width than the model's, and for layers that the
    model does not have.
    """
    if _decoder(reference) or _position(reference):
        direction = read_direction(
            reference,
            layer_offset=layer_offset,
            site=site,
            hidden_size=hidden_size,
            layer_count=layer_count,
        )
    direction.select([], hidden_size)
    direction.check_layers(layer_count)
    path = _native_path(reference)
    notes = understanding(direction)
    if path is not None and site is None and "site" not in read_vectors(path)[1]:
        notes.append(
            f"{path.name} names no site; {DEFAULT_SITE} is assumed (--direction-site to say another)"
        )
    return direction, notes


def understanding(direction: Direction) -> list[str]:
    """Return sentences on how a direction's file was understood, and on layers that it lacks."""
    if "understood" in direction.metadata and not direction.absent:
        return [f"direction understood as {direction.metadata['understood']}"]
    left_out = describe_absent(direction)
    understood = direction.metadata.get("understood", "")
    said = [f"direction understood as {understood}"] if understood else []
    return said + ([f"the direction's {left_out}"] if left_out not in understood else [])


def is_decoder(reference: Any) -> bool:
    """Tell whether a reference is an autoencoder's row."""
    return _decoder(reference) is not None


def _open(
    reference: Any, hidden_size: int | None, layer_count: int | None
) -> tuple[GivenVectors, str]:
    if not isinstance(reference, (str, Path)):
        return objects.read_object(reference), type(reference).__name__
    decoder, position = _decoder(reference), _position(reference)
    pick = None
    if position is not None:
        path, pick = position[0], Pick(position[1], layer_count)
    else:
        path = decoder.path if decoder else find_direction(str(reference))
    try:
        check_pointer(path, DirectionError)
        if decoder is not None:
            return autoencoders.read_decoder(decoder, hidden_size), path.name
        if path.is_dir():
            _refuse_model(path)
            _refuse_position(pick, path)
            return rotalabs.read_folder(path), path.name
        return _choose_reader(path)(path, pick), path.name
    except OSError as error:
        raise DirectionError(f"{path} cannot be read: {error.strerror or error}") from None


def _decoder(reference: Any) -> autoencoders.DecoderReference | None:
    if not isinstance(reference, (str, Path)) or _exists(reference):
        return None
    return autoencoders.parse_reference(str(reference))


def _position(reference: Any) -> tuple[Path, int] | None:
    """Return the file and the position of `FILE[POSITION]`; None for anything else."""
    if not isinstance(reference, (str, Path)) or _exists(reference) or _decoder(reference):
        return None
    match = _POSITION.fullmatch(str(reference))
    return (expand_user(match["file"]), int(match["position"])) if match else None


def _exists(reference: str | Path) -> bool:
    try:
        return Path(reference).exists()
    except (OSError, ValueError):  # A name that is no path: too long, or with a zero byte in it.
        return False


def _refuse_position(pick: Pick | None, path: Path) -> None:
    if pick is not None:
        raise DirectionError(
            f"{path.name} has no positions; FILE[POSITION] is for an array of (positions, layers, "
            f"hidden_size)"
        )


def _refuse_model(folder: Path) -> None:
    """Raise DirectionError for a folder that is a model or an adapter of one."""
    if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.bin").is_file():
        raise DirectionError(
            f"{folder} is a PEFT adapter and no direction; merge it into the model, and give the merged "
            f"model to bake"
        )
    if (folder / "config.json").is_file():
        raise DirectionError(
            f"{folder} is a model and no direction; give the file that holds the vectors"
        )


def _native_path(reference: Any) -> Path | None:
    """Return the path of a reference that bake's own reader takes; None for every other format."""
    if not isinstance(reference, (str, Path)) or _decoder(reference) or _position(reference):
        return None
    path = find_direction(str(reference))
    check_pointer(path, DirectionError)
    if path.is_dir() or (path.is_file() and _choose_reader(path) is not _read_native):
        return None
    return path


def _check_own_words(path: Path) -> None:
    """Raise DirectionError where the metadata of a file that is named as bake's own says another use."""
    if path.is_file():
        metadata = open_header(path).metadata
        read_declared({key: text for key, text in metadata.items() if key != "site"}, path.name)


def _choose_reader(path: Path) -> Reader:
    """Return the reader for a file, by its name, else by its first bytes, else bake's own."""
    if not path.is_file():
        raise DirectionError(f"no direction file {path}; make one with bake direction")
    suffix = path.suffix.lower()
    if suffix in (".pt", ".json") and rotalabs.is_rotalabs(path):
        return rotalabs.read_pair
    if suffix in READERS:
        return READERS[suffix]
    if suffix != ".safetensors":
        with path.open("rb") as stream:
            start = stream.read(4)
        if start[:2] == b"PK":
            return arrays.read_npz if arrays.npz_names(path) else pickles.read_pt
        if start in MAGIC:
            return MAGIC[start]
    if safetensors_reader.is_own(open_header(path)):
        return _read_native
    return safetensors_reader.read_safetensors


def _read_native(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read bake's own file with its lengths: for another site or offset, and for conversion."""
    _refuse_position(pick, path)
    _check_own_words(path)
    vectors, metadata = read_vectors(path)
    site = metadata.pop("site", None)
    if site is not None:
        check_site(site)
    for layer, length in own_scale(metadata, path).items():
        if layer in vectors:
            vectors[layer] = vectors[layer] * length
    metadata.pop(SCALE_KEY, None)
    return GivenVectors(NATIVE, vectors, site=site, metadata=metadata)


__all__ = [
    "NATIVE",
    "check_width",
    "fit_direction",
    "is_decoder",
    "read_direction",
    "read_given",
    "understanding",
]
