"""What is on disk: a checkpoint's config, tensor names, shapes and files; its bytes only on demand.

`open_checkpoint` reads headers and no weights. It follows transformers: of every listed shard *every*
key counts, whether the index mentions it or not. Which files hold the weights is `weight_files`'
business, how a file is laid out `safetensors_file`'s, fetching `download`'s; older pickled weights are
converted first, by `conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.companions import find_companions
from bake.conversion import ConvertedDirectory, convert_weights
from bake.download import COMMIT_SHA, download_checkpoint
from bake.errors import CheckpointError
from bake.safetensors_file import (
    DTYPES,
    Header,
    TensorEntry,
    decode_tensor,
    read_header,
    read_range,
)
from bake.weight_files import find_weight_files, read_json

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
    index's, None for a single file. `directory` is what to read; it is `source`, the user's or the
    Hub's, but for pickled weights: these are `converted` into one that goes with this object.
    """

    directory: Path
    source: Path
    model_id: str
    revision: str | None
    config: Mapping[str, Any]
    config_text: str
    headers: Mapping[str, Header]
    tensors: Mapping[str, TensorEntry]
    index_metadata: Mapping[str, Any] | None
    companions: tuple[str, ...]
    converted: ConvertedDirectory | None = field(default=None, compare=False, repr=False)

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
    config, config_text = read_json(config_path)
    files = find_weight_files(directory, config)
    source, converted = directory, None
    if files.pickled:
        converted = convert_weights(directory, files)
        directory = converted.path
        files = find_weight_files(directory, config)
    headers = {file: read_header(directory / file, file) for file in files.names}
    files.check_complete(
        directory, {f: frozenset(e.name for e in h.tensors) for f, h in headers.items()}
    )
    return Checkpoint(
        directory=directory,
        source=source,
        model_id=model_id,
        revision=revision,
        config=config,
        config_text=config_text,
        headers=headers,
        tensors=_merge(directory, headers),
        index_metadata=files.metadata,
        companions=find_companions(directory),
        converted=converted,
    )


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
