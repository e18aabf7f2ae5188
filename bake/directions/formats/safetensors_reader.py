"""Other tools' safetensors: tensors named by layer or place, one lone tensor, or a matrix of layers.

bake's own files, `direction` or `direction.{l}` of one axis, are `direction`'s. What is meant is
decided from the header, so that of a large file only the vectors are read.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.directions.direction_file import bound_metadata, open_header
from bake.directions.formats.declared import is_layer_list
from bake.directions.formats.given import Array, GivenVectors, Pick, gather
from bake.errors import CheckpointError, DirectionError
from bake.io.safetensors import Header, TensorEntry, decode_tensor, read_range

if TYPE_CHECKING:
    import torch

FORMAT = "safetensors"
REAL = frozenset(("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"))
WHOLE = frozenset(("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"))
SMALL = 80_000  # bytes of a number or a list of layers
_OWN = re.compile(r"direction(?:\.(?:0|[1-9][0-9]{0,5}))?")


def is_own(header: Header) -> bool:
    """Tell whether a file's vectors are named and shaped as bake's own are."""
    own = [entry for entry in header.tensors if _OWN.fullmatch(entry.name)]
    return bool(own) and all(len(entry.shape) == 1 for entry in own)


def read_safetensors(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read other tools' files: names as `.npz` has them; metadata and small integers are what is said."""
    header = open_header(path)
    arrays: dict[Any, Array] = {}
    fields: dict[Any, Any] = dict(header.metadata)
    for entry in header.tensors:
        is_list = is_layer_list(entry.name) and len(entry.shape) == 1
        if entry.dtype in WHOLE and entry.size <= SMALL and (entry.elements == 1 or is_list):
            fields.setdefault(entry.name, _read(path, entry).tolist())
        else:
            arrays[entry.name] = Array(
                entry.shape, entry.dtype in REAL, partial(_read, path, entry)
            )
    metadata = bound_metadata(header.metadata, path.name)
    metadata.pop("site", None)
    return gather(FORMAT, arrays, fields, path.name, pick, metadata=metadata)


def _read(path: Path, entry: TensorEntry) -> torch.Tensor:
    try:
        return decode_tensor(read_range(path, entry.start, entry.end), entry.dtype, entry.shape)
    except CheckpointError as error:
        raise DirectionError(f"{path.name}: {error}") from None
