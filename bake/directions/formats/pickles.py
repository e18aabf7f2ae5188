"""PyTorch's files, `.pt`, `.pth`, `.bin`: tensors that torch's weights-only reader knows, and no code.

A pickle can run code when it is read. Files are opened with `weights_only=True`, which knows tensors,
numbers and containers, and refuses everything else; the archive is checked first, and what comes out is
checked against the bytes that are there.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.directions.formats.declared import is_layer_list
from bake.directions.formats.given import (
    Array,
    GivenVectors,
    Pick,
    from_tensor,
    gather,
    printable,
    shorten,
)
from bake.directions.formats.places import MAX_LAYERS
from bake.errors import DirectionError
from bake.support.text import explain_briefly

if TYPE_CHECKING:
    import torch

FORMAT = "PyTorch file"
# Where tools put the vectors inside a dictionary of other things.
NESTS = ("layer_activations", "directions", "vectors", "steering_vectors")
DEPTH = 2  # containers in each other that are looked into
_GLOBAL = re.compile(r"GLOBAL (\S+)")
# What torch's reader lets through from a damaged pickle: it checks types, not lengths.
_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def read_pt(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read a tensor, a list of them (one a layer), or a dictionary {layer: tensor}, also nested.

    Strings and numbers beside the tensors are what the file says of them.
    """
    value = load_tensors(path)
    size = path.stat().st_size
    given = _read_value(value, path.name, pick)
    for layer, vector in given.vectors.items():
        if vector.numel() * vector.element_size() > size:
            raise DirectionError(
                f"{path.name}: the vector of layer {layer} has {vector.numel()} values, more than the "
                f"file holds; save it with .contiguous()"
            )
    return given


def load_tensors(path: Path) -> Any:
    """Return what torch.load reads without running code.

    Raises DirectionError for a broken archive, for code, and for files from before PyTorch 1.6, whose
    sizes cannot be checked before memory is taken for them.
    """
    import torch

    sizes = _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of TorchScript, which is refused anyway.
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refuse_code(path, str(error)) from None
    except _ERRORS as error:
        raise DirectionError(
            f"{path.name} is no sound PyTorch file ({explain_briefly(error)}); save it again"
        ) from None
    for tensor in _tensors_in(value):
        _check_storage(tensor, sizes, path.name)
    return value


def _refuse_code(path: Path, message: str) -> DirectionError:
    found = _GLOBAL.search(message)
    if not found:
        return DirectionError(f"{path.name} is no sound PyTorch file; save it again")
    code = printable(found[1]).rstrip(".")
    if code.startswith("steering_vectors."):
        remedy = "torch.save(steering_vector.layer_activations, FILE) saves the same without code"
    else:
        remedy = "save the tensors alone: torch.save({layer: tensor, …}, FILE)"
    return DirectionError(
        f"{path.name} holds pickled code ({code}), which bake never runs; {remedy}"
    )


def _check_archive(path: Path) -> set[int]:
    """Return the sizes of the archive's records, each of which is whole."""
    with path.open("rb") as stream:
        if stream.read(2) != b"PK":
            raise DirectionError(
                f"{path.name} is no archive of PyTorch 1.6 or later; torch.load it and torch.save it "
                f"again"
            )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise zipfile.BadZipFile("compressed, which torch.save never does")
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum does not match")
            return {entry.file_size for entry in entries}
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, LookupError) as error:
        raise DirectionError(
            f"{path.name} is no sound PyTorch file ({explain_briefly(error)}); save it again"
        ) from None
    except NotImplementedError:
        raise DirectionError(f"{path.name} is no sound PyTorch file; save it again") from None


def _check_storage(tensor: torch.Tensor, sizes: set[int], origin: str) -> None:
    """Raise DirectionError for a tensor that is not simply values in this file."""
    import torch

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized or tensor.is_nested:
        raise DirectionError(
            f"{origin} holds a sparse, quantized or absent tensor; save it with .to_dense().float()"
        )
    if tensor.untyped_storage().nbytes() not in sizes:
        raise DirectionError(f"{origin} claims more values than the file holds; save it again")


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors at the top, in its containers, and in theirs: all that are looked at."""
    import torch

    found, level = [], {id(value): value}  # By identity: a pickle can refer to one list many times.
    for _ in range(DEPTH + 1):
        found += [item for item in level.values() if isinstance(item, torch.Tensor)]
        level = {id(inner): inner for item in level.values() for inner in _contents(item)}
    return found


def _contents(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


def _read_value(value: Any, origin: str, pick: Pick | None) -> GivenVectors:
    import torch

    if isinstance(value, torch.Tensor):
        vectors, picked = from_tensor(value.detach(), origin, pick)
        return GivenVectors(FORMAT, vectors, notes=picked)
    notes: list[str] = []
    fields: dict[Any, Any] = {}
    for _ in range(DEPTH):
        nest = _find_nest(value)
        if nest is None:
            break
        fields |= _fields_of(value)
        value, origin = value[nest], f"{origin}: {nest}"
        notes.append(f"from its {nest}")
    if isinstance(value, torch.Tensor):
        value = {origin.rpartition(": ")[2]: value}
    elif isinstance(value, (list, tuple)):
        value = _from_list(value, origin)
        notes.append("a list, one vector a layer")
    elif not isinstance(value, Mapping):
        raise DirectionError(
            f"{origin} holds a {type(value).__name__}; save a tensor, or {{layer: tensor, …}}"
        )
    fields |= _fields_of(value)
    arrays = {
        key: Array.of(item.detach())
        for key, item in value.items()
        if isinstance(item, torch.Tensor) and key not in fields
    }
    return gather(FORMAT, arrays, fields, origin, pick, notes=notes)


def _find_nest(value: Any) -> str | None:
    """Return the key of a dictionary under which its vectors are; None where they are its own."""
    import torch

    if not isinstance(value, Mapping):
        return None
    kinds = (Mapping, torch.Tensor, list, tuple)
    return next((nest for nest in NESTS if isinstance(value.get(nest), kinds)), None)


def _fields_of(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return what a dictionary says beside its tensors; single numbers and lists of layers are said."""
    import torch

    found: dict[Any, Any] = {}
    for key, item in value.items():
        if isinstance(item, torch.Tensor):
            if item.ndim == 0 or (item.numel() < MAX_LAYERS and is_layer_list(key)):
                found[key] = item.tolist()
        elif isinstance(item, (str, int, float, bool, list, tuple, Mapping)) and key not in NESTS:
            found[key] = list(item) if isinstance(item, tuple) else item
    return found


def _from_list(value: list[Any] | tuple[Any, ...], origin: str) -> dict[int, torch.Tensor]:
    import torch

    for index, item in enumerate(value):
        if not isinstance(item, torch.Tensor):
            raise DirectionError(
                f"{origin} holds a list whose entry {index} is a {shorten(type(item).__name__)}; save "
                f"a list of tensors, one a layer"
            )
    return {index: item.detach() for index, item in enumerate(value)}
