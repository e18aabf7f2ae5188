"""One safetensors file: its header, checked, and the bytes of its tensors.

The format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}} with an optional `__metadata__` of strings, then the data without holes
(https://huggingface.co/docs/safetensors). bake has its own reader because it needs absolute
offsets, so that kept tensors move as bytes and patched ones are written in place; the checks are
those of the reference implementation. This module knows nothing of shards, indexes or models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from bake.errors import CheckpointError
from bake.io.foreign_json import parse_json
from bake.io.git_lfs import check_data

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
PREFIX_BYTES = 8  # the length of the header, little-endian
METADATA_KEY = "__metadata__"

# safetensors dtype → (bits per element, torch's name, or None where torch cannot hold it)
DTYPES: Mapping[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor: its name, safetensors dtype ("BF16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of data; dtypes under 8 bits are packed."""
        return self.elements * DTYPES[self.dtype][0] // 8


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """A tensor that lies in a file: bytes [start, end) counted from the file's first byte."""

    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. `tensors` are in the order of their data."""

    file: str
    metadata: Mapping[str, str]
    tensors: tuple[TensorEntry, ...]
    data_start: int
    file_size: int


def read_header(path: Path, file: str) -> Header:
    """Read and check the header of the safetensors file at `path`, called `file` in entries.

    Raises CheckpointError, in one line, when the file is truncated, too long, or not what it says
    it is.
    """
    try:
        with path.open("rb") as stream:
            file_size = path.stat().st_size
            prefix = stream.read(PREFIX_BYTES)
            raw = stream.read(header_length(path, prefix))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return parse_header(path, file, raw, header_length(path, prefix), file_size)


def header_length(origin: Path | str, prefix: bytes) -> int:
    """The length of the JSON header, from a file's first 8 bytes; `origin` is for messages."""
    if len(prefix) < PREFIX_BYTES:
        raise _broken(origin, f"it has {len(prefix)} bytes, fewer than a safetensors prefix")
    check_data(prefix, origin)
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(
            origin, f"its header claims {length} bytes, above the {MAX_HEADER_BYTES} allowed"
        )
    return length


def parse_header(origin: Path | str, file: str, raw: bytes, length: int, file_size: int) -> Header:
    """Check the header `raw`, which should have `length` bytes, of a file of `file_size` bytes."""
    if len(raw) < length:
        raise _broken(origin, f"it is truncated inside its header ({len(raw)} of {length} bytes)")
    fields = _parse_header(origin, raw)
    metadata = _check_metadata(origin, fields.pop(METADATA_KEY, None))
    data_start = PREFIX_BYTES + length
    tensors = sorted(
        (_check_entry(origin, file, name, value, data_start) for name, value in fields.items()),
        key=lambda entry: (entry.start, entry.end),
    )
    _check_layout(origin, tensors, data_start, file_size)
    return Header(file, metadata, tuple(tensors), data_start, file_size)


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and JSON header of a file that holds `specs` in this order.

    Padded with spaces to a multiple of 8 bytes, so that the data begins aligned. The same input
    gives the same bytes.
    """
    fields: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))}
    offset = 0
    for spec in specs:
        end = offset + spec.size
        fields[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def alignment_order(spec: TensorSpec) -> int:
    """Sort key that puts wide dtypes first, so that tensors begin at multiples of their width."""
    return -DTYPES[spec.dtype][0]


def torch_dtype(code: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype. Raises CheckpointError where this torch has none."""
    import torch

    dtype = getattr(torch, DTYPES[code][1] or "", None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"dtype {code} has no counterpart in torch {torch.__version__}: such a tensor can be "
            "kept but not decoded."
        )
    return dtype


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """What a header would say of `tensor`. Raises CheckpointError for a dtype that has no code."""
    torch_name = str(tensor.dtype).removeprefix("torch.")
    for code, (_, known) in DTYPES.items():
        if known == torch_name:
            return TensorSpec(name, code, tuple(tensor.shape))
    raise CheckpointError(
        f"tensor {name} has dtype {tensor.dtype}, which safetensors cannot store."
    )


def encode_tensor(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` as safetensors stores them: row-major, little-endian."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def decode_tensor(data: bytearray, dtype: str, shape: Iterable[int]) -> torch.Tensor:
    """A tensor over `data` (not copied), of safetensors `dtype` and `shape`."""
    import torch

    if not data:  # frombuffer refuses an empty buffer
        return torch.empty(tuple(shape), dtype=torch_dtype(dtype))
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).reshape(tuple(shape))


def read_range(path: Path, start: int, end: int) -> bytearray:
    """Bytes [start, end) of the file. Raises CheckpointError where they cannot be read."""
    data = bytearray(end - start)
    view = memoryview(data)
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            done = 0
            while done < len(data):  # one read returns at most 2 GiB
                count = stream.readinto(view[done:])
                if not count:
                    raise _broken(path, f"it ends before byte {end}")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    return data


def _broken(path: Path | str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound safetensors file: {problem}; download or save it again."
    )


def _parse_header(path: Path | str, raw: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = parse_json(
        raw, f"{path} is not a sound safetensors file: its header", max_bytes=MAX_HEADER_BYTES
    )
    return fields


def _check_metadata(path: Path | str, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, f"its {METADATA_KEY} is not a map of strings")
    return metadata


def _check_entry(
    path: Path | str, file: str, name: str, value: Any, data_start: int
) -> TensorEntry:
    """One header field as an entry whose size is what its dtype and shape say."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name} has no proper dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype!r}, which bake does not know; "
            f"known are {', '.join(DTYPES)}."
        )
    start, end = offsets
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits % 8 or end - start != bits // 8:
        raise _broken(
            path,
            f"tensor {name} ({dtype} {shape}) needs {bits / 8:g} bytes and has {end - start}",
        )
    return TensorEntry(name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(
    path: Path | str, tensors: Sequence[TensorEntry], data_start: int, file_size: int
) -> None:
    """The data has no holes, no overlaps, and ends where the file ends."""
    position = data_start
    for entry in tensors:
        if entry.start != position:
            problem = (
                "overlaps the tensor before it" if entry.start < position else "follows a hole"
            )
            raise _broken(path, f"the data of tensor {entry.name} {problem}")
        position = entry.end
    if position != file_size:
        kind = "truncated" if file_size < position else "followed by foreign bytes"
        raise _broken(path, f"it is {kind} ({file_size} bytes, its header describes {position})")
