"""GGUF control vectors: tensors `direction.N`, as llama.cpp's `--control-vector` takes them.

What N means. llama.cpp adds `direction.N` to the output of its layer N, counted from 0 (`l_out-N`; the
two −1 in common_control_vector_load_one and llama_adapter_cvec::apply cancel), and takes no
`direction.0`. repeng writes the layer whose output it measured, so its N is the same. llama.cpp's own
cvector-generator numbers what it measured at layer l's output l + 1, so its vectors are added one layer
after they were found. Here N is the 0-based layer, which does what llama.cpp does with the file;
`--layer-offset -1` puts the generator's where they were found.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is read by a reader of our own:
every length is checked against the bytes that are left before it is used, which the `gguf` package
does not do (an array that claims 2^40 entries in a file of 50 bytes keeps its reader busy for ever, with
some 80 MB more every second); it writes (`gguf_writer`).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.directions.formats.declared import read_declared
from bake.directions.formats.given import GivenVectors, Pick, printable
from bake.directions.formats.places import MAX_LAYERS
from bake.errors import DirectionError
from bake.io.safetensors import decode_tensor, read_range

if TYPE_CHECKING:
    import torch

FORMAT = "GGUF control vector"
ARCHITECTURE = "controlvector"
MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER = 64_000_000  # of names and values; a control vector's has a few thousand bytes
MAX_TENSORS = MAX_LAYERS
MAX_VALUES = 10_000  # of metadata; a control vector has three, a model about forty
MAX_STRINGS = 4_000_000  # in arrays; a model's vocabulary, which is told apart afterwards
MAX_DIMENSIONS = 4  # of a ggml tensor
DEFAULT_ALIGNMENT = 32
STRING, ARRAY, INT32, UINT32 = 8, 9, 5, 4
# GGUF's value type → struct code, by number
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# ggml's tensor type → safetensors dtype: the real ones that are not quantized
DTYPES = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
_NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's entry: `dimensions` as ggml orders them, `start` from the file's first byte."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata and tensors. kinds: {key: GGUF's value type}; arrays are not kept."""

    metadata: Mapping[str, Any]
    kinds: Mapping[str, int]
    tensors: tuple[GgufTensor, ...]


def read_gguf(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read a control vector; N of `direction.N` is the 0-based layer to whose output it is added.

    Raises DirectionError for a file that is broken, is no control vector, holds quantized vectors, or says
    that its vectors are not to be added to the layer's output.
    """
    if pick is not None:
        raise DirectionError(f"{path.name} has no positions; a control vector has one a layer")
    file = parse_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise DirectionError(
            f"{path.name} is a GGUF file of {str(architecture)[:60]!r} and no control vector"
        )
    said = {key: value for key, value in file.metadata.items() if not key.startswith("general.")}
    declared = read_declared(said, path.name, layer_output_only=True)
    vectors: dict[int | None, torch.Tensor] = {}
    for tensor in file.tensors:
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise DirectionError(
                f"{path.name} holds a tensor {tensor.name[:60]!r}; a control vector's are direction.N"
            )
        vectors[int(match[1])] = _read_tensor(path, tensor)
    if not vectors:
        raise DirectionError(
            f"{path.name} holds no tensor; a control vector has direction.1 and on"
        )
    hint = printable(file.metadata.get("controlvector.model_hint", ""))
    vectors = {layer: vectors[layer] for layer in sorted(vectors, key=lambda layer: layer or 0)}
    return GivenVectors(
        f"{FORMAT} for {hint}" if hint else FORMAT,
        vectors,
        site="mlp_out",
        notes=[*_explain(file, vectors), *declared.notes],
        metadata={"model_hint": hint} if hint else {},
    )


def _explain(file: GgufFile, vectors: Mapping[int | None, Any]) -> list[str]:
    """Return how N was understood, and what speaks for another reading."""
    notes = ["N taken as the 0-based layer to whose output llama.cpp adds it"]
    count = file.metadata.get("controlvector.layer_count")
    numbers = [tensor.name for tensor in file.tensors]
    if 0 in vectors:
        notes.append("llama.cpp would refuse direction.0, so another tool counted from 0")
    elif (
        file.kinds.get("controlvector.layer_count") == INT32
        and count == len(vectors)
        and numbers == [f"direction.{layer}" for layer in range(1, len(vectors) + 1)]
    ):
        notes.append(
            "looks like cvector-generator's, found one layer before llama.cpp adds it "
            "(--layer-offset -1 uses it where it was found)"
        )
    elif isinstance(count, int) and count != len(vectors):
        notes.append(f"its layer_count says {count}")
    strength = file.metadata.get("glp.alpha_default")
    if isinstance(strength, int | float) and strength != 1:
        notes.append(f"its own strength glp.alpha_default = {strength:g} is not applied")
    return notes


def _read_tensor(path: Path, tensor: GgufTensor) -> torch.Tensor:
    """Read a vector; dimensions of length 1 do not count."""
    origin = f"{path.name}: {tensor.name}"
    code = DTYPES.get(tensor.kind)
    if code is None:
        raise DirectionError(
            f"{origin} is quantized or of integers (ggml type {tensor.kind}); a direction is of real "
            f"numbers (F32)"
        )
    if sum(size > 1 for size in tensor.dimensions) > 1:
        raise DirectionError(
            f"{origin} has dimensions {list(tensor.dimensions)}; a direction is one vector"
        )
    width = math.prod(tensor.dimensions)
    size = width * {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}[code]
    if not width or tensor.start + size > path.stat().st_size:
        raise _broken(path, f"{tensor.name} of {width} values is not inside it")
    return decode_tensor(read_range(path, tensor.start, tensor.start + size), code, (width,))


def parse_gguf(path: Path) -> GgufFile:
    """Parse a file's header: metadata and where its tensors lie. Raises DirectionError if broken."""
    with path.open("rb") as stream:
        cursor = _Cursor(path, stream.read(MAX_HEADER))
    if cursor.take(4) != MAGIC:
        raise _broken(path, "it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise _broken(path, f"it is {kind}; bake reads little-endian versions 2 and 3")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    if tensor_count > MAX_TENSORS:
        raise _broken(path, f"it claims {tensor_count} tensors")
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    if value_count > MAX_VALUES:
        raise _broken(path, f"it claims {value_count} values")
    for _ in range(value_count):
        key, kind = cursor.string(), cursor.number("I")
        if key in kinds:
            raise _broken(path, f"it has the key {key[:60]!r} twice")
        kinds[key], metadata[key] = kind, cursor.value(kind)
    entries = [_parse_tensor(cursor) for _ in range(tensor_count)]
    if len({name for name, *_ in entries}) < len(entries):
        raise _broken(path, "it names a tensor twice")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise _broken(path, f"its alignment is {alignment!r}")
    start = math.ceil(cursor.position / alignment) * alignment
    tensors = tuple(
        GgufTensor(name, dimensions, kind, start + offset)
        for name, dimensions, kind, offset in entries
    )
    return GgufFile(metadata, kinds, tensors)


def _parse_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.string(), cursor.number("I")
    if rank > MAX_DIMENSIONS:
        raise _broken(cursor.path, f"tensor {name[:60]!r} claims {rank} dimensions")
    dimensions = tuple(cursor.number("Q") for _ in range(rank))
    return name, dimensions, cursor.number("I"), cursor.number("Q")


class _Cursor:
    """A position in a header; every step checks that the bytes are there."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.position, self.strings = path, data, 0, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise _broken(
                self.path,
                f"it ends inside its header: {count} bytes wanted at byte {self.position} of "
                f"{len(self.data)}",
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _broken(self.path, "a name in it is not text") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise _broken(self.path, f"it has a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            self.take(count * struct.calcsize(f"<{SCALARS[inner]}"))
            return None
        if inner != STRING:
            raise _broken(self.path, f"it has an array of the unknown type {inner}")
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise _broken(self.path, f"it has {self.strings} strings in arrays")
        for _ in range(count):
            self.take(self.number("Q"))
        return None


def _broken(path: Path, problem: str) -> DirectionError:
    return DirectionError(
        f"{path.name} is no sound GGUF file: {problem}; download or save it again"
    )
