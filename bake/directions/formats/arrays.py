"""numpy's files: `.npy` holds one array, `.npz` several by name. Nothing in them is ever unpickled.

A header decides how much is read only after it has been checked against the bytes that are there, so that
a lying header can neither allocate nor read past the end.
"""

from __future__ import annotations

import io
import math
import tokenize
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bake.directions.formats.declared import is_layer_list
from bake.directions.formats.given import (
    Array,
    GivenVectors,
    Pick,
    from_tensor,
    gather,
    shorten,
)
from bake.errors import DirectionError
from bake.support.text import explain_briefly

if TYPE_CHECKING:
    import numpy as np
    import torch

NPY, NPZ = "numpy array (.npy)", "numpy arrays (.npz)"
MAX_HEADER = 10_000  # numpy's own limit
DEFLATE_RATIO = 1032  # the most that deflate can expand
HEADROOM = 10_000  # bytes that an entry may have whatever it is packed into
LARGE, BOMB_RATIO = 64_000_000, 50  # bytes, and how far numbers do not pack
MAX_ARRAYS = 10_000
SMALL = 80_000  # bytes of a text or a list of layers
# What numpy's header parser raises for text that is no header.
_BAD_HEADER = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)
_BAD_READ = (*_BAD_ARCHIVE, RuntimeError, KeyError, OverflowError, OSError, MemoryError)


def read_npy(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read `.npy`: (hidden_size,) for all layers, or (layers, hidden_size), row l for layer l."""
    with path.open("rb") as stream:
        tensor = _read_array(stream, path.stat().st_size, path.name)
    vectors, notes = from_tensor(tensor, path.name, pick)
    return GivenVectors(NPY, vectors, notes=notes)


def read_npz(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read `.npz`: arrays named by layer (`12`, `layer_12`, `direction.12`), or one array.

    Text and single numbers in it are what the file says of its vectors; a list of layers numbers rows.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _BAD_ARCHIVE as error:
        raise _broken(path.name, error) from None
    with archive:
        arrays, fields = _list_arrays(archive, path.name)
        return gather(NPZ, arrays, fields, path.name, pick)


def _list_arrays(archive: zipfile.ZipFile, file: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the archive's arrays by name, from their headers alone, and its small values."""
    entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    if len(entries) > MAX_ARRAYS:
        raise DirectionError(f"{file} holds {len(entries)} arrays; a direction has a few hundred")
    arrays: dict[str, Array] = {}
    fields: dict[str, Any] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        origin = f"{file}: {shorten(name)}"
        if name in arrays or name in fields:
            raise DirectionError(f"{file} names an array {shorten(name)} twice; save it again")
        shape, dtype = _read_shape(archive, entry, origin)
        is_value = dtype.kind in "US" or math.prod(shape) == 1
        if dtype.hasobject:
            fields[name] = "Python objects"  # Whatever they say is not read.
        elif is_value or (dtype.kind in "iu" and is_layer_list(name)):
            fields[name] = _read_small(archive, entry, origin)
            continue
        arrays[name] = Array(shape, dtype.kind == "f", partial(_read_entry, archive, entry, origin))
    return arrays, fields


def _read_shape(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, origin: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        with archive.open(entry) as stream:
            shape, _, dtype = _read_header(stream, origin)
    except _BAD_READ as error:
        raise _broken(origin, error) from None
    return shape, dtype


def _read_small(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, origin: str) -> Any:
    """Return a text, a number or a short list of them as plain values."""
    import numpy as np

    if entry.file_size > SMALL:
        return None  # No name of an operation or a place, and no list of layers.
    try:
        with archive.open(entry) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False).tolist()
    except (*_BAD_READ, *_BAD_HEADER) as error:
        raise _broken(origin, error) from None


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, origin: str) -> torch.Tensor:
    """Read one array of an open archive."""
    size, packed = entry.file_size, min(entry.compress_size, archive.start_dir)
    if size > DEFLATE_RATIO * packed + HEADROOM or (size > LARGE and size > BOMB_RATIO * packed):
        raise DirectionError(
            f"{origin} claims {size} bytes and has {packed} packed, more than a direction's; save it "
            f"again with numpy.savez"
        )
    try:
        with archive.open(entry) as stream:
            return _read_array(stream, size, origin)
    except _BAD_READ as error:
        raise _broken(origin, error) from None


def npz_names(path: Path) -> list[str]:
    """Return the names of an archive's arrays; raise DirectionError where it is no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [
                name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")
            ]
    except _BAD_ARCHIVE as error:
        raise _broken(path.name, error) from None


def read_npz_array(path: Path, name: str) -> torch.Tensor:
    """Read one array of an archive."""
    origin = f"{path.name}: {shorten(name)}"
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_entry(archive, archive.getinfo(f"{name}.npy"), origin)
    except _BAD_READ as error:
        raise _broken(origin, error) from None


def write_npy(vectors: dict[int | None, torch.Tensor]) -> bytes:
    """Return `.npy` bytes of vectors for all layers, or of layers 0, 1, … without a gap."""
    import numpy as np

    layers = sorted(layer for layer in vectors if layer is not None)
    if layers != list(range(len(layers))):
        raise DirectionError(
            f".npy holds no layer numbers, and the direction begins at layer {layers[0]} or has gaps; "
            f"write .npz, .gguf or .safetensors"
        )
    rows = [vectors[layer].float().numpy() for layer in layers]
    out = io.BytesIO()
    np.save(out, np.stack(rows) if rows else vectors[None].float().numpy(), allow_pickle=False)
    return out.getvalue()


def write_npz(vectors: dict[int | None, torch.Tensor]) -> bytes:
    """Return `.npz` bytes: `direction` for all layers, or `layer_{l}`. No times: the same each run."""
    import numpy as np

    arrays = {
        "direction" if layer is None else f"layer_{layer}": vector.float().numpy()
        for layer, vector in vectors.items()
    }
    out = io.BytesIO()
    np.savez(out, allow_pickle=False, **arrays)
    return out.getvalue()


def _read_array(stream: IO[bytes], size: int, origin: str) -> torch.Tensor:
    """Read one array of `size` bytes, header and all."""
    import numpy as np
    import torch

    shape, fortran, dtype = _read_header(stream, origin)
    if dtype.hasobject or dtype.fields is not None or dtype.subdtype is not None:
        raise DirectionError(
            f"{origin} holds Python objects or records, which bake never unpickles; save an array of "
            f"float32 (numpy.save with allow_pickle=False)"
        )
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise DirectionError(
            f"{origin} holds {dtype} values; a direction is of real numbers (float32)"
        )
    needed = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or needed > size:
        raise DirectionError(
            f"{origin} is damaged: its header says {list(shape)[:4]} of {dtype}, {needed} bytes, and "
            f"the file has {size}; save it again"
        )
    data = stream.read(needed)
    if len(data) != needed or stream.read(1):
        raise DirectionError(f"{origin} is truncated or has bytes after its end; save it again")
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=True))


def _read_header(stream: IO[bytes], origin: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Of headers from Python 2, and of odd text in broken ones.
            version = npy.read_magic(stream)
            if version not in readers:
                raise ValueError(f"version {version} is for records with Unicode names")
            return readers[version](stream, max_header_size=MAX_HEADER)
    except _BAD_HEADER as error:
        raise _broken(origin, error) from None


def _broken(origin: str, error: BaseException) -> DirectionError:
    if isinstance(error, DirectionError):
        return error
    return DirectionError(
        f"{origin} is no sound numpy file ({explain_briefly(error)}); save it again"
    )
