"""Old weights become safetensors: `pytorch_model.bin` and its shards, before anything else sees them.

A pickle can hold code, and none is ever run: files are read with torch's weights-only reader, which
knows tensors and nothing more. Shard by shard, tensor by tensor, they are written into a temporary
directory that the rest of bake takes for the base; names stay as they are. A weight that is there
under two names because the model ties them is written once, as transformers does. The directory lives
as long as the handle that `convert_weights` returns, and what a killed run leaves, the next clears.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bake.checkpoint.carried_files import find_companions
from bake.checkpoint.index import INDEX_FILE, SINGLE_FILE, WeightFiles
from bake.checkpoint.pretrained import load_config
from bake.errors import CheckpointError, OutputError
from bake.io.copy import free_bytes, write_all
from bake.io.git_lfs import check_pointer
from bake.io.safetensors import (
    Header,
    TensorEntry,
    TensorSpec,
    alignment_order,
    encode_header,
    encode_tensor,
    spec_of,
)
from bake.io.work_directory import clear_dead_runs, make_work_directory, remove_scratch
from bake.support.progress import announce
from bake.support.text import explain_briefly

if TYPE_CHECKING:
    import torch

_PREFIX = "bake-converted-"
_METADATA = {"format": "pt"}
_GLOBAL = re.compile(r"GLOBAL (\S+)")


class ConvertedDirectory:
    """A temporary directory in the shape of a checkpoint; removed when nobody holds this object.

    `path` is the directory. It is made where temporary files go (TMPDIR).
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        clear_dead_runs(parent, _PREFIX, remove_scratch)
        work, lock = make_work_directory(parent, _PREFIX, mode=0o700)
        self._finalizer = weakref.finalize(self, _discard, work, lock)
        self.path = work / "model"
        self.path.mkdir()


@dataclass(frozen=True)
class _Shard:
    """A file that will be written: which names of which old file it holds, in order."""

    name: str
    source: Path
    specs: tuple[TensorSpec, ...]

    @property
    def header(self) -> Header:
        """The header of the safetensors file, known before the file is."""
        data_start = len(encode_header(self.specs, _METADATA))
        entries, position = [], data_start
        for spec in self.specs:
            end = position + spec.size
            entries.append(TensorEntry(spec.name, spec.dtype, spec.shape, self.name, position, end))
            position = end
        return Header(self.name, _METADATA, tuple(entries), data_start, position)


def convert_weights(directory: Path, files: WeightFiles) -> ConvertedDirectory:
    """Convert the pickled weights of `directory`; everything else there is linked.

    Raises CheckpointError for a file that is broken or holds anything but tensors, OutputError
    where the place for temporary files has no room.
    """
    shards = _plan(directory, files)
    needed = sum(shard.header.file_size for shard in shards)
    announce(
        f"converting {len(shards)} pickled weight file{'s' * (len(shards) > 1)} to safetensors "
        f"({needed / 1e9:.2f} GB, temporary)"
    )
    try:
        converted = ConvertedDirectory()
        _check_room(converted.path, needed)
        for shard in shards:
            _write_shard(converted.path / shard.name, shard)
        if files.index is not None:
            _write_index(converted.path / INDEX_FILE, shards)
        for name in ("config.json", *find_companions(directory)):
            link = converted.path / name
            link.parent.mkdir(exist_ok=True)
            link.symlink_to((directory / name).resolve())
    except OSError as error:
        raise OutputError(
            f"{tempfile.gettempdir()} cannot hold the converted weights ({needed / 1e9:.2f} GB): "
            f"{error.strerror or error}; set TMPDIR to a directory with room."
        ) from error
    return converted


def describe_conversion(
    directory: Path, files: WeightFiles
) -> tuple[dict[str, Header], WeightFiles]:
    """The files that `convert_weights` would write, and their headers, without writing them."""
    headers = {shard.name: shard.header for shard in _plan(directory, files)}
    names = {
        file: frozenset(entry.name for entry in header.tensors) for file, header in headers.items()
    }
    if files.index is None:
        return headers, WeightFiles(None, names, None)
    return headers, WeightFiles(INDEX_FILE, names, {})


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file by name, mapped and not read where the file's format allows.

    Raises CheckpointError, in one line, for a broken file and for one that holds anything else,
    code above all, which is never run.
    """
    import torch

    check_pointer(path)
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped: they are read whole.
        mapped = _is_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if found:
            raise CheckpointError(
                f"{path} holds pickled code ({found[1]}), which bake never runs: "
                "give a copy of the model in safetensors."
            ) from None
        raise _broken(path, "its pickle is damaged, or no state dict") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError) as error:
        raise _broken(path, explain_briefly(error)) from None
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"{path} holds no tensors by name: give a checkpoint that save_pretrained wrote."
        )
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path} holds {name!r}, a {type(tensor).__name__} and no tensor: "
                "give a checkpoint that save_pretrained wrote."
            )
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{path}: tensor {name} is sparse or quantized, which safetensors cannot store."
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_archive(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a sound PyTorch file ({reason}): download or save it again."
    )


def _plan(directory: Path, files: WeightFiles) -> list[_Shard]:
    """Decide every file and tensor from the pickles' descriptions; no weight is read."""
    tied = _tied_names(directory)
    shards, present = [], {}
    for number, file in enumerate(files.names, start=1):
        tensors = read_pickled(directory / file)
        present[file] = frozenset(tensors)
        dropped = _find_aliases(tensors, tied)
        specs = [spec_of(name, tensor) for name, tensor in tensors.items() if name not in dropped]
        name = f"model-{number:05d}-of-{len(files.names):05d}.safetensors"
        shards.append(
            _Shard(
                name if files.index else SINGLE_FILE,
                directory / file,
                tuple(sorted(specs, key=alignment_order)),
            )
        )
    files.check_complete(directory, present)
    return shards


def _tied_names(directory: Path) -> dict[str, str]:
    """{name: the name that it is tied to}, as transformers knows the architecture; else nothing.

    A config that makes no model, for whatever reason, is refused later, where it is examined.
    """
    from bake.checkpoint.loading import build_on_meta

    try:
        model = build_on_meta(load_config(directory))
    except Exception:
        return {}
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _find_aliases(tensors: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> set[str]:
    """The names that are left out: tied to another name that is there and is the same memory.

    Names on disk may lack the prefix of the module's (GPT-2's `wte.weight`).
    """

    def same(name: str, wanted: str) -> bool:
        return name == wanted or wanted.endswith(f".{name}") or name.endswith(f".{wanted}")

    dropped: set[str] = set()
    for target, source in tied.items():
        targets = [name for name in tensors if same(name, target)]
        sources = [name for name in tensors if same(name, source) and name not in dropped]
        for name in targets:
            if any(name != other and _alias(tensors[name], tensors[other]) for other in sources):
                dropped.add(name)
    return dropped


def _alias(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same bytes in memory, read the same way."""
    return (left.data_ptr(), left.dtype, left.shape, left.stride()) == (
        right.data_ptr(),
        right.dtype,
        right.shape,
        right.stride(),
    )


def _write_shard(target: Path, shard: _Shard) -> None:
    tensors = read_pickled(shard.source)
    with target.open("xb", buffering=0) as stream:
        write_all(stream, memoryview(encode_header(shard.specs, _METADATA)))
        for spec in shard.specs:
            write_all(stream, encode_tensor(tensors[spec.name]))


def _write_index(target: Path, shards: Sequence[_Shard]) -> None:
    specs = [(spec, shard.name) for shard in shards for spec in shard.specs]
    index = {
        "metadata": {"total_size": sum(spec.size for spec, _ in specs)},
        "weight_map": {spec.name: file for spec, file in specs},
    }
    target.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_room(directory: Path, needed: int) -> None:
    free = free_bytes(directory)
    if free < needed:
        raise OutputError(
            f"converting the pickled weights needs {needed / 1e9:.2f} GB in {tempfile.gettempdir()}, "
            f"which has {free / 1e9:.2f} GB free: set TMPDIR to a directory with room."
        )


def _discard(work: Path, lock: int) -> None:
    try:
        remove_scratch(work)
    finally:
        os.close(lock)
