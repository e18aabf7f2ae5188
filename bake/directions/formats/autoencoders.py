"""One row of a sparse autoencoder's decoder: `FILE:TENSOR[INDEX]`, such as `sae.safetensors:W_dec[512]`.

A decoder is (features, hidden_size) in most libraries and (hidden_size, features) where it is a linear
layer's weight. The axis whose length is the model's hidden size tells, or without a model the shorter
one, because dictionaries have more features than the stream has dimensions; where both fit, INDEX is a
row. Of a safetensors file only what is needed is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bake.directions.direction import check_dtype
from bake.directions.formats.arrays import npz_names, read_npz_array
from bake.directions.formats.given import GivenVectors
from bake.directions.formats.pickles import load_tensors
from bake.errors import CheckpointError, DirectionError
from bake.io.foreign_paths import expand_user
from bake.io.safetensors import DTYPES, decode_tensor, read_header, read_range

if TYPE_CHECKING:
    import torch

FORMAT = "autoencoder decoder"
_REFERENCE = re.compile(r"(?P<file>.+):(?P<tensor>[^:\[\]]+)\[(?P<index>[0-9]{1,9})\]")


@dataclass(frozen=True)
class DecoderReference:
    """`FILE:TENSOR[INDEX]`, taken apart."""

    path: Path
    tensor: str
    index: int


def parse_reference(reference: str) -> DecoderReference | None:
    """Return the parts of `FILE:TENSOR[INDEX]`; None for anything else."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        return None
    return DecoderReference(expand_user(match["file"]), match["tensor"], int(match["index"]))


def read_decoder(reference: DecoderReference, hidden_size: int | None = None) -> GivenVectors:
    """Read one feature's decoder vector, for all layers.

    hidden_size: the model's, where it is known; then exactly one axis must have that length, or both.
    Raises DirectionError naming the shape where neither has, or INDEX is beyond the other axis.
    """
    path, name = reference.path, reference.tensor
    if not path.is_file():
        raise DirectionError(f"no file {path}; an autoencoder's row is FILE:TENSOR[INDEX]")
    origin = f"{path.name}: {name}"
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        vector, shape, along_rows = _from_safetensors(reference, origin, hidden_size)
    else:
        matrix = _from_npz(reference) if suffix == ".npz" else _from_pt(reference)
        shape = tuple(matrix.shape)
        along_rows = choose_axis(shape, reference.index, hidden_size, origin)
        vector = matrix[reference.index] if along_rows else matrix[:, reference.index]
    check_dtype(vector, origin)
    layout = "(features, hidden_size)" if along_rows else "(hidden_size, features)"
    return GivenVectors(
        FORMAT,
        {None: vector.clone()},
        notes=[
            f"feature {reference.index} of {name[:60]}, {shape[0]} × {shape[1]} read as {layout}"
        ],
        metadata={"feature": f"{name[:60]}[{reference.index}]"},
    )


def choose_axis(shape: tuple[int, ...], index: int, hidden_size: int | None, origin: str) -> bool:
    """Tell whether INDEX is a row of a decoder of this shape (True) or a column (False)."""
    if len(shape) != 2 or 0 in shape:
        raise DirectionError(f"{origin} has shape {shape}; a decoder is (features, hidden_size)")
    rows, columns = shape
    if hidden_size is None:
        along_rows = columns <= rows  # The pipeline asks again when the model is known.
    elif hidden_size not in shape:
        raise DirectionError(
            f"{origin} has shape {shape} and the model's hidden size is {hidden_size}, which is "
            f"neither; give a decoder that was trained on this model"
        )
    else:
        along_rows = columns == hidden_size
    features = rows if along_rows else columns
    if index >= features:
        raise DirectionError(
            f"{origin} has shape {shape}, so features 0 to {features - 1}; there is no {index}"
        )
    return along_rows


def _from_safetensors(
    reference: DecoderReference, origin: str, hidden_size: int | None
) -> tuple[torch.Tensor, tuple[int, ...], bool]:
    """Read a row's bytes alone; a column needs the matrix."""
    try:
        header = read_header(reference.path, reference.path.name)
        entries = {entry.name: entry for entry in header.tensors}
        if reference.tensor not in entries:
            raise _no_tensor(reference, list(entries))
        entry = entries[reference.tensor]
        along_rows = choose_axis(entry.shape, reference.index, hidden_size, origin)
        if not along_rows:
            data = read_range(reference.path, entry.start, entry.end)
            matrix = decode_tensor(data, entry.dtype, entry.shape)
            return matrix[:, reference.index], entry.shape, False
        width = entry.shape[1] * DTYPES[entry.dtype][0] // 8
        start = entry.start + reference.index * width
        data = read_range(reference.path, start, start + width)
        return decode_tensor(data, entry.dtype, entry.shape[1:]), entry.shape, True
    except CheckpointError as error:
        raise DirectionError(str(error)) from None


def _from_npz(reference: DecoderReference) -> torch.Tensor:
    names = npz_names(reference.path)
    if reference.tensor not in names:
        raise _no_tensor(reference, names)
    return read_npz_array(reference.path, reference.tensor)


def _from_pt(reference: DecoderReference) -> torch.Tensor:
    import torch

    value = load_tensors(reference.path)
    tensors = value if isinstance(value, dict) else {}
    found = tensors.get(reference.tensor)
    if not isinstance(found, torch.Tensor):
        names = [key for key, item in tensors.items() if isinstance(item, torch.Tensor)]
        raise _no_tensor(reference, [str(name) for name in names])
    return found.detach()


def _no_tensor(reference: DecoderReference, names: list[str]) -> DirectionError:
    shown = ", ".join(name[:60] for name in names[:8]) or "none"
    return DirectionError(
        f"{reference.path.name} holds no tensor {reference.tensor[:60]}; it has {shown}"
    )
