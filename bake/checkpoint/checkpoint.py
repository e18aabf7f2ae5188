"""What is on disk: a checkpoint's config, tensor names, shapes and files; its bytes only on demand.

`open_checkpoint` reads headers and no weights. It follows transformers: of every listed shard *every*
key counts, whether the index mentions it or not. Which files hold the weights is `weight_files`'
business, how a file is laid out `safetensors_file`'s, fetching `download`'s; older pickled weights are
converted first, by `conversion`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.carried_files import find_companions
from bake.checkpoint.download import (
    Description,
    download_bake,
    download_checkpoint,
    download_config,
    download_description,
    list_repository,
)
from bake.checkpoint.foreign_config import check_config
from bake.checkpoint.hub_cache import identify
from bake.checkpoint.index import WeightFiles, find_weight_files
from bake.checkpoint.left_out import is_draft, list_beside
from bake.checkpoint.pickled import ConvertedDirectory, convert_weights, describe_conversion
from bake.checkpoint.remote import read_remote_headers
from bake.errors import CheckpointError
from bake.io.foreign_json import read_json_text
from bake.io.foreign_paths import leads_out
from bake.io.git_lfs import check_pointer
from bake.io.links import check_directory
from bake.io.safetensors import (
    DTYPES,
    Header,
    TensorEntry,
    decode_tensor,
    read_header,
    read_range,
)

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"  # peft's, of a directory without a model
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
    `pickled` says so. `headers_only`: nothing more may be read. `hashes` are those that the Hub told,
    SHA-256 by file. `drafts` are files of multi-token prediction beside the weights that can be carried,
    `beside` whatever else lies there, see `bake.checkpoint.left_out`.
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
    pickled: bool = False
    headers_only: bool = False
    hashes: Mapping[str, str] = field(default_factory=dict)
    drafts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(self.headers)

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directories that its files lie in: its own, and the Hub cache's blobs."""
        folders = [(self.source / file).resolve().parent for file in self.shards]
        return tuple(dict.fromkeys([self.source.resolve(), *folders]))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors.values())

    @property
    def headers_sha256(self) -> str:
        """Names a checkpoint without its path: config.json, and every tensor's name, dtype and shape.

        It tells architectures and sizes apart, not two trainings of one.
        """
        entries = sorted((entry.name, entry.dtype, entry.shape) for entry in self.tensors.values())
        return hashlib.sha256(json.dumps([self.config_text, entries]).encode()).hexdigest()

    def entry(self, name: str) -> TensorEntry:
        """Where tensor `name` lies. Raises CheckpointError for an unknown name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.model_id} has no tensor {name}.")
        return self.tensors[name]

    def check_new(self, name: str) -> None:
        """Raise CheckpointError where a tensor is there already that a bake would have to create.

        The base's architecture has no such parameter, so transformers drops it, and no bake may
        bring it to life.
        """
        if name in self.tensors:
            raise CheckpointError(
                f"{self.model_id} holds {name}, which its architecture does not have and transformers "
                f"drops on loading (a bias that was set in memory and saved?); bake the model that it "
                f"was made from, or take such tensors out"
            )

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
        """The SHA-256 by which the Hub or its cache knows `file`, or None where it does not."""
        if file in self.hashes:
            return self.hashes[file]
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
        if self.headers_only:
            raise CheckpointError(
                f"the weights of {self.model_id} would be needed ({entry.name}), and only their "
                "headers were to be read."
            )
        return read_range(self.directory / entry.file, entry.start + start, entry.start + stop)


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    headers_only: bool = False,
    allowed: Collection[Path] | None = (),
) -> Checkpoint:
    """Open a local directory or a Hub id, which is downloaded into the Hub's cache.

    `revision` is a branch, tag or commit on the Hub and has no meaning for a directory. With
    `headers_only` no weight is downloaded, converted or read. `allowed` are directories that the user
    named too, which links of this one may lead into; None where the directory has been checked already.
    Raises CheckpointError when `model` is neither, when a link leads out of it, or when the files in it
    contradict each other.
    """
    directory = _find_directory(model, revision, allowed)
    if directory is not None:
        model_id, sha = identify(directory)
        if headers_only:
            return _read_headers(Description(directory, sha, {}), model_id)
        return _read_checkpoint(directory, model_id, sha)
    if headers_only:
        return _read_headers(download_description(model, revision), model)
    directory, sha = download_checkpoint(model, revision)
    return _read_checkpoint(directory, model, sha, list_repository(model, sha or revision))


def open_description(model: str, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint of which only the config is needed; weights stay on the Hub.

    Raises CheckpointError as `open_checkpoint` does.
    """
    directory = _find_directory(model, revision)
    if directory is None:
        directory = download_description(model, revision).directory
    _read_config(directory)
    return directory


def find_config(model: str, revision: str | None = None) -> Mapping[str, Any]:
    """Return what config.json of a model says, of one on the Hub without anything else of it.

    Raises CheckpointError as `open_checkpoint` does.
    """
    directory = _find_directory(model, revision) or download_config(model, revision)
    return _read_config(directory)[0]


def find_bake(model: str, revision: str | None = None) -> Path:
    """The directory of a baked model with all its files, downloaded where `model` is a Hub id.

    Raises CheckpointError as `open_checkpoint` does.
    """
    return _find_directory(model, revision) or download_bake(model, revision)


def _find_directory(
    model: str, revision: str | None, allowed: Collection[Path] | None = ()
) -> Path | None:
    """The local directory that `model` means, links resolved; None where it may be a Hub id."""
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
        if allowed is not None and os.path.lexists(directory / "config.json"):
            check_directory(directory, allowed=allowed)
        return directory
    if model and exists:
        raise CheckpointError(
            f"{model} is a file: give the directory that holds it and its config.json."
        )
    if is_path(model):
        raise CheckpointError(
            f"{model or 'an empty path'} does not exist: give a checkpoint's directory or a Hub id."
        )
    return None


def is_path(model: str) -> bool:
    """Tell whether a name can only be a path, and no Hub id."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or not model


def _read_config(directory: Path) -> tuple[dict[str, Any], str]:
    path = directory / "config.json"
    if not path.is_file() and (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory} is a PEFT adapter: merge it into its base (merge_and_unload) and give that."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no config.json: give the directory of a transformers checkpoint."
        )
    values, text = read_json_text(path)
    check_config(values, path)
    return values, text


def _read_checkpoint(
    directory: Path, model_id: str, revision: str | None, listed: Collection[str] = ()
) -> Checkpoint:
    """The checkpoint of a directory; listed: the files of its repository on the Hub."""
    source, converted = directory, None
    files = find_weight_files(directory, _read_config(directory)[0])
    if files.pickled:
        converted = convert_weights(directory, files)
        directory = converted.path
        files = find_weight_files(directory, {})
    headers = {file: read_header(directory / file, file) for file in files.names}
    checkpoint = _assemble(directory, model_id, revision, headers, files)
    checkpoint = replace(
        checkpoint, source=source, converted=converted, pickled=converted is not None
    )
    return _look_beside(checkpoint, [*files.names, *([files.index] if files.index else [])], listed)


def _read_headers(description: Description, model_id: str) -> Checkpoint:
    """The checkpoint from headers alone: those of files that are here, and the Hub's."""
    directory = description.directory
    files = find_weight_files(directory, _read_config(directory)[0], description.has)
    away = [file for file in files.names if not (directory / file).is_file()]
    if files.pickled and away:
        raise CheckpointError(
            f"{model_id} has only pickled weights ({away[0]}), whose headers cannot be read from "
            "afar: download it and give its directory."
        )
    pickled = files.pickled
    if pickled:
        headers, files = describe_conversion(directory, files)
    else:
        remote = read_remote_headers(model_id, description.revision, away)
        headers = {
            file: remote[file] if file in remote else read_header(directory / file, file)
            for file in files.names
        }
    checkpoint = _assemble(directory, model_id, description.revision, headers, files)
    known = {name: file.sha256 for name, file in description.files.items() if file.sha256}
    checkpoint = replace(checkpoint, pickled=pickled, headers_only=True, hashes=known)
    loaded = [*files.names, *([files.index] if files.index else [])]
    return _look_beside(checkpoint, loaded, description.files)


def _look_beside(
    checkpoint: Checkpoint, loaded: Collection[str], listed: Collection[str]
) -> Checkpoint:
    """Add what else lies there. loaded: the weight files and their index; listed: the Hub's list."""
    known = {"config.json", *checkpoint.companions, *loaded}
    beside = {
        *list_beside(checkpoint.source, known),
        *(name for name in listed if name not in known),
    }
    drafts = [
        name
        for name in sorted(beside)
        if is_draft(name) and _is_disjoint(checkpoint, checkpoint.directory / name)
    ]
    return replace(checkpoint, drafts=tuple(drafts), beside=tuple(sorted(beside)))


def _is_disjoint(checkpoint: Checkpoint, path: Path) -> bool:
    """Whether a file of weights is here and has none of the checkpoint's tensors a second time."""
    if not path.is_file() or leads_out(path.parent, path.name):
        return False
    return not any(
        entry.name in checkpoint.tensors for entry in read_header(path, path.name).tensors
    )


def _assemble(
    directory: Path,
    model_id: str,
    revision: str | None,
    headers: Mapping[str, Header],
    files: WeightFiles,
) -> Checkpoint:
    """Put together what was read, after checking that it agrees."""
    config, config_text = _read_config(directory)
    files.check_complete(
        directory,
        {file: frozenset(e.name for e in header.tensors) for file, header in headers.items()},
    )
    companions = find_companions(directory)
    for name in companions:
        check_pointer(directory / name)
    return Checkpoint(
        directory=directory,
        source=directory,
        model_id=model_id,
        revision=revision,
        config=config,
        config_text=config_text,
        headers=headers,
        tensors=_merge(directory, headers),
        index_metadata=files.metadata,
        companions=companions,
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
