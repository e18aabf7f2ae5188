"""What is on disk: a checkpoint's config, tensor names, shapes and files; its bytes only on demand.

`open_checkpoint` reads headers and no weights. It follows transformers: the config may name the
weights, `model.safetensors` beats an index, and of every listed shard *every* key counts, whether
the index mentions it or not. How a file is laid out is `safetensors_file`'s, fetching is
`download`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bake.companions import find_companions
from bake.download import COMMIT_SHA, INDEX_FILE, SINGLE_FILE, download_checkpoint, named_weights
from bake.errors import CheckpointError
from bake.safetensors_file import (
    DTYPES,
    Header,
    TensorEntry,
    decode_tensor,
    read_header,
    read_range,
)

if TYPE_CHECKING:
    import torch

# A blob of the Hub's cache that was stored as a large file is named by the SHA-256 of its content.
_BLOB_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's description.

    `model_id` is the Hub id, or a local directory's name; `revision` the commit sha, where there
    is one. `shards` are the weight files, in the order in which transformers reads them;
    `companions` the files that a bake carries over byte for byte. `index_metadata` is the
    index's, None for a single file.
    """

    directory: Path
    model_id: str
    revision: str | None
    config: Mapping[str, Any]
    config_text: str
    headers: Mapping[str, Header]
    tensors: Mapping[str, TensorEntry]
    index_metadata: Mapping[str, Any] | None
    companions: tuple[str, ...]

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(self.headers)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())

    def entry(self, name: str) -> TensorEntry:
        """Where tensor `name` lies. Raises CheckpointError for an unknown name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.model_id} has no tensor {name}.")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype and shape, in memory of its own."""
        entry = self.entry(name)
        return decode_tensor(self._read_range(entry, 0, entry.size), entry.dtype, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension of tensor `name`; only their bytes are read."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"rows {start}:{stop} are outside tensor {name} of shape {list(entry.shape)}."
            )
        row_bits = (entry.elements // max(entry.shape[0], 1)) * DTYPES[entry.dtype][0]
        data = self._read_range(entry, start * row_bits // 8, stop * row_bits // 8)
        return decode_tensor(data, entry.dtype, (stop - start, *entry.shape[1:]))

    def read_bytes(self, name: str) -> bytes:
        """The bytes of tensor `name` as they are stored."""
        entry = self.entry(name)
        return bytes(self._read_range(entry, 0, entry.size))

    def known_sha256(self, file: str) -> str | None:
        """The SHA-256 by which the Hub's cache knows `file`, or None where it does not."""
        path = self.directory / file
        blob = path.readlink().name if path.is_symlink() else ""
        return blob if _BLOB_SHA256.fullmatch(blob) else None

    def to_dict(self) -> dict[str, Any]:
        """What the card and the user are told; no paths."""
        return {
            "id": self.model_id,
            "revision": self.revision,
            "size": self.size,
            "tensors": len(self.tensors),
            "shards": list(self.shards),
            "dtypes": sorted({entry.dtype for entry in self.tensors.values()}),
            "companions": list(self.companions),
        }

    def _read_range(self, entry: TensorEntry, start: int, stop: int) -> bytearray:
        return read_range(self.directory / entry.file, entry.start + start, entry.start + stop)


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a local directory or a Hub id, which is downloaded into the Hub's cache.

    `revision` is a branch, tag or commit on the Hub and has no meaning for a directory. Raises
    CheckpointError when it is neither, or when the files in it contradict each other.
    """
    try:
        path = Path(model).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # no such user's home, no permission, too long a name
        raise CheckpointError(f"{model} cannot be opened: {error}.") from error
    if model and is_directory:  # an empty path would mean the working directory
        if revision is not None:
            raise CheckpointError(
                f"{model} is a directory and has no revision {revision}: leave the revision out "
                "or give a Hub id."
            )
        directory = path.resolve()
        model_id, sha = _identity(directory)
    elif model and exists:
        raise CheckpointError(
            f"{model} is a file: give the directory that holds it and its config.json."
        )
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1 or not model:
        raise CheckpointError(
            f"{model or 'an empty path'} does not exist: give a checkpoint's directory or a Hub id."
        )
    else:
        directory, sha = download_checkpoint(model, revision)
        model_id = model
    return _read_checkpoint(directory, model_id, sha)


def _identity(directory: Path) -> tuple[str, str | None]:
    """(id, commit sha) of a directory: the Hub's where it is a snapshot in the Hub's cache."""
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        sha = directory.name if COMMIT_SHA.fullmatch(directory.name) else None
        return "/".join(repository.split("--")[1:]), sha
    return directory.name, None


def _read_checkpoint(directory: Path, model_id: str, revision: str | None) -> Checkpoint:
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{directory} has no config.json: give the directory of a transformers checkpoint."
        )
    config, config_text = _read_json(config_path)
    weights = _find_weights(directory, config)
    if weights.endswith(".index.json"):
        headers, metadata = _read_shards(directory, weights)
    else:
        headers, metadata = {weights: read_header(directory / weights, weights)}, None
    return Checkpoint(
        directory=directory,
        model_id=model_id,
        revision=revision,
        config=config,
        config_text=config_text,
        headers=headers,
        tensors=_merge(directory, headers),
        index_metadata=metadata,
        companions=find_companions(directory),
    )


def _find_weights(directory: Path, config: Mapping[str, Any]) -> str:
    """The weight file or index that transformers would load from `directory`."""
    named = named_weights(config)
    if named is not None:
        _check_inside(directory / "config.json", named)
        if not named.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{directory / 'config.json'} names the weights {named}, which is no safetensors "
                "file or index: correct transformers_weights."
            )
        if not (directory / named).is_file():
            raise CheckpointError(
                f"{directory / 'config.json'} names the weights {named}, which are not there: "
                "download or save the checkpoint again."
            )
        return named
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return name
    other = sorted(
        path.name
        for pattern in ("*.bin", "*.bin.index.json", "*.safetensors", "*.gguf", "*.pth")
        for path in directory.glob(pattern)
    )
    found = f" (found {', '.join(other[:3])})" if other else ""
    raise CheckpointError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}: bake reads safetensors "
        "only; load the model with transformers, save_pretrained it elsewhere, and give that."
    )


def _read_shards(directory: Path, index: str) -> tuple[dict[str, Header], dict[str, Any]]:
    """The listed shards' headers, sorted by name as in transformers; the index's metadata."""
    path = directory / index
    fields, _ = _read_json(path)
    weight_map, metadata = fields.get("weight_map"), fields.get("metadata")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to files: download or save it again."
        )
    headers = {}
    folder = PurePosixPath(index).parent  # an index in a folder lists its shards relative to it
    for file in sorted(set(weight_map.values())):
        _check_inside(path, file)
        shard = str(folder / file)
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"{path} lists {file}, which is not there: download the checkpoint again."
            )
        headers[shard] = read_header(directory / shard, shard)
    present = {file: {entry.name for entry in header.tensors} for file, header in headers.items()}
    for name, file in weight_map.items():
        if name not in present[str(folder / file)]:
            raise CheckpointError(
                f"{path} says that tensor {name} is in {file}, which does not hold it: "
                "download or save the checkpoint again."
            )
    return headers, metadata if isinstance(metadata, dict) else {}


def _merge(directory: Path, headers: Mapping[str, Header]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for header in headers.values():
        for entry in header.tensors:
            if entry.name in tensors:
                raise CheckpointError(
                    f"{directory} has tensor {entry.name} twice, in {tensors[entry.name].file} and "
                    f"in {entry.file}: the last one would win; save the checkpoint again."
                )
            tensors[entry.name] = entry
    if not tensors:
        raise CheckpointError(f"{directory} has weight files without tensors: save it again.")
    return tensors


def _check_inside(path: Path, file: str) -> None:
    """Refuse a file name, found in `path`, that leads out of the checkpoint."""
    parts = PurePosixPath(file)
    if not file or parts.is_absolute() or ".." in parts.parts or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"{path} names the weight file {file!r}, outside the checkpoint: do not trust it."
        )


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object at `path`, and its text."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:  # newlines stay as they are
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): download or save the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object: download or save it again.")
    return value, text
