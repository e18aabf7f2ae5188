"""The bytes: a plan's edits and a base become the files of a new checkpoint, in a staged directory.

Everything is decided by `layout` first; here it is copied, patched and streamed, never more than
one tensor in memory. Putting the directory in its place, or away after a failure, is `staging`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.edits import REMOVED, Edit
from bake.checkpoint.index import INDEX_FILE
from bake.checkpoint.layout import (
    Action,
    ComputedTensors,
    CopiedTensor,
    Layout,
    PlannedFile,
    plan_layout,
)
from bake.checkpoint.own_code import find_code_keys
from bake.checkpoint.pretrained import TOKENIZER_CONFIG
from bake.errors import CheckpointError, OutputError
from bake.io.copy import (
    Progress,
    can_clone,
    copy_file,
    copy_range,
    free_bytes,
    link_file,
    open_source,
    sync,
    write_all,
)
from bake.io.foreign_json import read_json, read_json_text
from bake.io.safetensors import encode_header, encode_tensor, spec_of

_COPIERS = 4  # more wait for the disk, or for the memory's bandwidth
_MARGIN = 16 * 1024 * 1024  # bytes for the index, the card, the figures


@dataclass(frozen=True)
class WrittenFile:
    """A weight file of the output: what was done to which file of the base; size in bytes."""

    name: str
    action: Action
    size: int
    base_file: str | None
    known_sha256: str | None


@dataclass(frozen=True)
class WrittenWeights:
    """The weight files of the output, sorted as the base's; the extra shard, the originals last.

    without_kept: the base shards that keep their bytes are listed and not there.
    """

    files: tuple[WrittenFile, ...]
    without_kept: bool = False

    @property
    def size(self) -> int:
        """Bytes of all files that are there."""
        return sum(file.size for file in self.files if file not in self.left_out)

    @property
    def left_out(self) -> tuple[WrittenFile, ...]:
        """The base shards that are not there."""
        return tuple(file for file in self.files if self.without_kept and file.action == "kept")

    @property
    def sources(self) -> dict[str, str]:
        """{file: the base's file that it holds the tensors of}; new files are not in it."""
        return {
            file.name: file.base_file
            for file in self.files
            if file.base_file is not None and file.action != "originals"
        }

    @property
    def known_sha256(self) -> dict[str, str]:
        """Hashes that the Hub's cache knows of files kept whole: for `hash_files`."""
        return {file.name: file.known_sha256 for file in self.files if file.known_sha256}

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "files": [asdict(file) for file in self.files]}


def write_weights(
    checkpoint: Checkpoint,
    edits: Sequence[Edit],
    staging: Path,
    *,
    shards: str = "copy",
    progress: Progress | None = None,
) -> WrittenWeights:
    """Write the weight files, their index and the originals into the directory `staging`.

    shards: "copy", or "hardlink" or "symlink" for base shards that keep their bytes; what is
    patched is always a copy. "none" leaves them out, reads no byte of the base, and takes no edit of
    a tensor that exists. `progress` is told bytes as they are written. Raises CheckpointError, before
    anything is written, for edits that contradict the checkpoint or need the base's bytes, and
    OutputError where the disk has no room for the result or a link cannot be made.
    """
    layout = plan_layout(checkpoint, edits)
    if shards == "none":
        _check_only_new(layout)
    else:
        check_links(checkpoint, shards)
    _check_room(checkpoint, layout, staging, linked=shards != "copy")
    copies: list[tuple[PlannedFile, Path]] = []
    for file in layout.files:
        target = staging / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.action == "kept" and shards == "none":
            continue
        if file.action == "kept" and shards != "copy":
            link_file(checkpoint.directory / str(file.base_file), target, shards)
        elif file.action == "kept" and _moved(checkpoint, file, target):
            pass
        elif file.action in ("kept", "patched"):
            copies.append((file, target))
        else:
            _write_pieces(checkpoint, file, target, progress)
    _copy_shards(checkpoint, copies, progress)
    _write_text(staging / INDEX_FILE, layout.index_text)
    files = tuple(_describe(checkpoint, file) for file in layout.files)
    return WrittenWeights(files, without_kept=shards == "none")


def write_config(checkpoint: Checkpoint, changes: Mapping[str, Any], staging: Path) -> None:
    """Write the base's config.json with `changes` ({key, dotted if nested: value or REMOVED})."""
    removed = dict.fromkeys(removed_keys(checkpoint.config), REMOVED)
    _write_text(staging / "config.json", edit_json(checkpoint.config_text, {**changes, **removed}))


def removed_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys of a config.json that no bake keeps, whatever its route."""
    # It names a weight file of the base; ours has the standard names.
    renamed = [key for key in ("transformers_weights",) if key in config]
    return [*renamed, *(key for key, _ in find_code_keys(config))]


def copy_companions(checkpoint: Checkpoint, staging: Path, *, drafts: bool = False) -> None:
    """Copy tokenizer, templates, licences and the like, byte for byte but for what names code in them.

    drafts: also the files of multi-token prediction.
    """
    code = find_companion_code(checkpoint)
    for name in (*checkpoint.companions, *(checkpoint.drafts if drafts else ())):
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in code:
            text = read_json_text(checkpoint.directory / name)[1]
            _write_text(target, edit_json(text, dict.fromkeys(code[name], REMOVED)))
        else:
            copy_file(checkpoint.directory / name, target)


def find_companion_code(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return {companion: {dotted key: what it names}} of tokenizer's and processor's code."""
    found = {
        name: dict(find_code_keys(read_json(checkpoint.directory / name)))
        for name in checkpoint.companions
        if name == TOKENIZER_CONFIG or name.endswith("processor_config.json")
    }
    return {name: keys for name, keys in found.items() if keys}


def check_links(checkpoint: Checkpoint, shards: str) -> None:
    """Raise OutputError where the base's shards cannot be linked to, whatever the file system."""
    if shards != "copy" and checkpoint.pickled:
        raise OutputError(
            f"--shards {shards}: {checkpoint.model_id} has no safetensors to link to, they are "
            "converted into a temporary directory: leave --shards out."
        )


def explain_links(checkpoint: Checkpoint, written: WrittenWeights, shards: str) -> str | None:
    """What somebody should know of an output that shares files with its base; None for copies."""
    kept = sum(file.action == "kept" for file in written.files)
    if shards in ("copy", "none") or not kept:
        return None
    folders = {(checkpoint.directory / file).resolve().parent.name for file in checkpoint.shards}
    owner = "the Hub's cache" if "blobs" in folders else f"the base {checkpoint.model_id}"
    consequence = (
        "it breaks when they are moved or deleted"
        if shards == "symlink"
        else "writing into one changes both"
    )
    return f"the output shares {kept} files with {owner} ({shards}): {consequence}"


def _check_only_new(layout: Layout) -> None:
    changed = [file for file in layout.files if file.action not in ("kept", "added")]
    if changed:
        raise CheckpointError(
            f"{changed[0].name} would have to be {changed[0].action}, so the base's own bytes are "
            "needed: leave --thin out."
        )


def _moved(checkpoint: Checkpoint, file: PlannedFile, target: Path) -> bool:
    """Take a converted shard over, where that costs nothing: its directory is ours and temporary."""
    if checkpoint.converted is None:
        return False
    try:
        target.hardlink_to(checkpoint.directory / str(file.base_file))
    except OSError:  # another file system, or one without links: it is copied
        return False
    return True


def _check_room(
    checkpoint: Checkpoint, layout: Layout, staging: Path, *, linked: bool = False
) -> None:
    files = [file for file in layout.files if not (linked and file.action == "kept")]
    copies = [file for file in files if file.action in ("kept", "patched")]
    cloned = bool(copies) and can_clone(checkpoint.directory / str(copies[0].base_file), staging)
    needed = _MARGIN + sum(file.size for file in files if not (cloned and file in copies))
    free = free_bytes(staging)
    if free < needed:
        raise OutputError(
            f"the output needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            "make room or give another output path."
        )


def _copy_shards(
    checkpoint: Checkpoint, copies: Sequence[tuple[PlannedFile, Path]], progress: Progress | None
) -> None:
    """Copy shards side by side: the kernel copies one at the speed of one core. Largest first."""
    copies = sorted(copies, key=lambda copy: -copy[0].size)
    with ThreadPoolExecutor(max_workers=min(_COPIERS, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(_copy_shard, checkpoint, *copy, progress) for copy in copies]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _copy_shard(
    checkpoint: Checkpoint, file: PlannedFile, target: Path, progress: Progress | None
) -> None:
    """A copy of a base shard with the new values of its patched tensors written over the old.

    Shards are not synced: for hundreds of gigabytes that would take longer than everything else,
    and their bytes are still in the base. What exists only here is small and is synced.
    """
    copy_file(checkpoint.directory / str(file.base_file), target, progress)
    if not file.patches:
        return
    with target.open("r+b", buffering=0) as stream:
        for patch in file.patches:
            stream.seek(checkpoint.tensors[patch.name].start)
            write_all(stream, encode_tensor(patch.tensor))


def _write_pieces(
    checkpoint: Checkpoint, file: PlannedFile, target: Path, progress: Progress | None
) -> None:
    """A file made piece by piece; one tensor (or one Transform's) in memory at a time."""
    with target.open("xb", buffering=0) as stream:
        write_all(stream, memoryview(encode_header(file.tensors, file.metadata or {})))
        for piece in file.pieces:
            if isinstance(piece, CopiedTensor):
                with open_source(checkpoint.directory / piece.entry.file) as source:
                    copy_range(source, piece.entry.start, piece.entry.size, stream, progress)
            else:
                _write_computed(piece, stream, progress)
    if file.action != "rewritten":
        sync(target)


def _write_computed(piece: ComputedTensors, stream: BinaryIO, progress: Progress | None) -> None:
    tensors = piece.function()
    made = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    promised = {spec.name: spec for spec in piece.tensors}
    if made != promised:
        raise CheckpointError(
            f"an edit made {sorted(map(str, made.values()))} and had promised "
            f"{sorted(map(str, promised.values()))}."
        )
    for spec in piece.tensors:
        write_all(stream, encode_tensor(tensors[spec.name]))
        if progress is not None:
            progress(spec.size)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")
    sync(path)


def _describe(checkpoint: Checkpoint, file: PlannedFile) -> WrittenFile:
    kept = file.action == "kept" and file.base_file is not None
    known = checkpoint.known_sha256(file.base_file) if kept and file.base_file else None
    return WrittenFile(file.name, file.action, file.size, file.base_file, known)
