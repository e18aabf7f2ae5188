"""What the output's weight files will be, decided and checked from headers before a byte moves.

A shard that no edit touches is kept; one with new values only is patched in a copy; one whose
header changes is rewritten tensor by tensor; new tensors go to one extra shard. This module plans
and `writer` executes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Add, Change, Drop, Edit, Merge, Patch, Rename, Transform
from bake.checkpoint.index import SINGLE_FILE
from bake.errors import CheckpointError
from bake.io.output_files import ORIGINALS_FILE, is_data
from bake.io.safetensors import (
    DTYPES,
    TensorEntry,
    TensorSpec,
    alignment_order,
    encode_header,
    spec_of,
)

if TYPE_CHECKING:
    import torch

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")

Action = Literal["kept", "patched", "rewritten", "added", "originals"]


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor whose bytes are those of a tensor of the base, under the same or another name."""

    name: str
    entry: TensorEntry

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.name, self.entry.dtype, self.entry.shape),)


@dataclass(frozen=True)
class ComputedTensors:
    """Tensors of one dtype that `function` makes when they are written: {name: tensor}."""

    tensors: tuple[TensorSpec, ...]
    function: Callable[[], Mapping[str, torch.Tensor]]


Piece = CopiedTensor | ComputedTensors


@dataclass(frozen=True)
class PlannedFile:
    """A weight file of the output: a copy of `base_file` with `patches`, or made of `pieces`."""

    name: str
    action: Action
    size: int
    tensors: tuple[TensorSpec, ...]
    base_file: str | None = None
    patches: tuple[Patch, ...] = ()
    pieces: tuple[Piece, ...] = ()
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Layout:
    """All weight files of the output, and the text of the index that lists them."""

    files: tuple[PlannedFile, ...]
    index_text: str


def plan_layout(checkpoint: Checkpoint, edits: Sequence[Edit]) -> Layout:
    """Plan the weight files. Raises CheckpointError for edits that contradict the checkpoint."""
    adds = [edit for edit in edits if isinstance(edit, Add)]
    changes = _changes(checkpoint, [edit for edit in edits if not isinstance(edit, Add)])
    planned = []
    for file in checkpoint.shards:
        entries = checkpoint.headers[file].tensors
        shard = _plan_shard(checkpoint, file, [(e, changes.get(e.name)) for e in entries])
        if shard.tensors:  # a shard that has lost its last tensor is left out
            planned.append(shard)
    if adds:
        planned.append(_plan_extra(adds))
    names = _name_files(
        [shard.base_file for shard in planned if shard.base_file is not None],
        extra=bool(adds),
        changed=bool(adds) or len(planned) < len(checkpoint.shards),
        indexed=checkpoint.index_metadata is not None,
    )
    weights = [_named(shard, name) for shard, name in zip(planned, names, strict=True)]
    _check_unique(weights)
    originals = [edit.name for edit in edits if isinstance(edit, Patch)]
    extra = [_plan_originals(checkpoint, originals)] if originals else []
    return Layout((*weights, *extra), _index_text(checkpoint, weights))


def _changes(checkpoint: Checkpoint, edits: Sequence[Change | Merge]) -> dict[str, Change | Merge]:
    """The edit of each existing tensor that has one; a Merge at the first tensor that it takes."""
    changes: dict[str, Change | Merge] = {}
    for edit in edits:
        kind = type(edit).__name__
        names = edit.names if isinstance(edit, Merge) else (edit.name,)
        for name in names:
            if name not in checkpoint.tensors:
                raise CheckpointError(
                    f"{kind} of {name}: {checkpoint.model_id} has no such tensor."
                )
            if name in changes:
                raise CheckpointError(
                    f"{kind} of {name}: it has a {type(changes[name]).__name__} already, "
                    "and a tensor takes one edit."
                )
            changes[name] = edit if name == names[0] else Drop(name)
        if isinstance(edit, Patch):
            _check_patch(checkpoint.tensors[edit.name], edit)
        dtype = edit.dtype if isinstance(edit, Transform | Merge) else None
        if dtype is not None and dtype not in DTYPES:
            raise CheckpointError(f"{kind} of {names[0]}: no safetensors dtype {dtype}.")
    return changes


def _check_patch(entry: TensorEntry, patch: Patch) -> None:
    new = spec_of(patch.name, patch.tensor)
    if (new.dtype, new.shape) != (entry.dtype, entry.shape):
        raise CheckpointError(
            f"Patch of {patch.name}: the new value is {new.dtype} {list(new.shape)}, "
            f"the stored one {entry.dtype} {list(entry.shape)}; both must be the same."
        )


def _plan_shard(
    checkpoint: Checkpoint, file: str, changed: Sequence[tuple[TensorEntry, Change | Merge | None]]
) -> PlannedFile:
    header = checkpoint.headers[file]
    edits = [edit for _, edit in changed if edit is not None]
    patches = tuple(edit for edit in edits if isinstance(edit, Patch))
    if len(patches) == len(edits):
        action: Action = "patched" if patches else "kept"
        return PlannedFile(file, action, header.file_size, header.tensors, file, patches)
    pieces = [piece for entry, edit in changed for piece in _edited_pieces(checkpoint, entry, edit)]
    metadata = {"format": "pt", **header.metadata}
    return _plan_pieces(file, "rewritten", pieces, metadata, base_file=file)


def _edited_pieces(
    checkpoint: Checkpoint, entry: TensorEntry, edit: Change | Merge | None
) -> list[Piece]:
    """What becomes of one tensor in a shard that is rewritten: nothing where it is dropped."""
    match edit:
        case None:
            return [CopiedTensor(entry.name, entry)]
        case Rename():
            return [CopiedTensor(edit.new_name, entry)]
        case Patch():
            return [_stored(edit)]
        case Transform() | Merge():
            dtype = edit.dtype or entry.dtype
            specs = [TensorSpec(name, dtype, tuple(shape)) for name, shape in edit.outputs.items()]
            computed = ComputedTensors(tuple(specs), lambda: compute(checkpoint, edit))
            return [computed] if specs else []
        case Drop():
            return []


def compute(checkpoint: Checkpoint, edit: Transform | Merge) -> Mapping[str, torch.Tensor]:
    """Read what an edit computes from, and compute it: {name: tensor}."""
    if isinstance(edit, Merge):
        return edit.function({name: checkpoint.read(name) for name in edit.names})
    return edit.function(checkpoint.read(edit.name))


def _stored(edit: Add | Patch) -> ComputedTensors:
    """The tensor that an edit brings along."""
    return ComputedTensors((spec_of(edit.name, edit.tensor),), lambda: {edit.name: edit.tensor})


def _plan_extra(adds: Sequence[Add]) -> PlannedFile:
    """The shard of the new tensors, by dtype and name: the order of the plan does not matter."""
    pieces = [_stored(add) for add in sorted(adds, key=lambda add: add.name)]
    return _plan_pieces("", "added", pieces, {"format": "pt"})


def _plan_originals(checkpoint: Checkpoint, names: Sequence[str]) -> PlannedFile:
    pieces = [CopiedTensor(name, checkpoint.tensors[name]) for name in sorted(names)]
    return _plan_pieces(ORIGINALS_FILE, "originals", pieces, {"format": "pt"})


def _plan_pieces(
    name: str,
    action: Action,
    pieces: Sequence[Piece],
    metadata: Mapping[str, str],
    base_file: str | None = None,
) -> PlannedFile:
    # The tensors of one piece share a dtype, so sorting whole pieces aligns every tensor.
    ordered = tuple(sorted(pieces, key=lambda piece: alignment_order(piece.tensors[0])))
    tensors = tuple(spec for piece in ordered for spec in piece.tensors)
    size = len(encode_header(tensors, metadata)) + sum(spec.size for spec in tensors)
    return PlannedFile(name, action, size, tensors, base_file, (), ordered, metadata)


def _name_files(
    base_files: Sequence[str], *, extra: bool, changed: bool, indexed: bool
) -> list[str]:
    """Names for the files that remain of the base, in order, and for the extra shard.

    Siblings are numbered together: `model-00003-of-00005` of a base becomes `…-of-00006`.
    """
    total = len(base_files) + extra
    if not indexed and total == 1:
        return [SINGLE_FILE]
    if indexed and not changed and SINGLE_FILE not in base_files:
        return list(base_files)
    matches = [_NUMBERED.fullmatch(file) for file in base_files]
    stems = {match["stem"] for match in matches if match}
    if all(matches) and len(stems) <= 1:
        stem = next(iter(stems), "model")
    elif not indexed or SINGLE_FILE in base_files:
        stem = "model"  # model.safetensors would beat the index, so it cannot keep its name
    else:
        names = ["model-bake", *(f"model-bake-{number}" for number in range(2, total + 2))]
        free = next(
            f"{name}.safetensors" for name in names if f"{name}.safetensors" not in base_files
        )
        return [*base_files, free] if extra else list(base_files)
    return [f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]


def _named(shard: PlannedFile, name: str) -> PlannedFile:
    if is_data(name):
        raise CheckpointError(
            f"the base has a weight file named {name}, which bake needs: rename it in the base."
        )
    return replace(shard, name=name)


def _check_unique(files: Sequence[PlannedFile]) -> None:
    places: dict[str, str] = {}
    for file in files:
        for spec in file.tensors:
            if spec.name in places:
                raise CheckpointError(
                    f"the edits leave two tensors named {spec.name}, in {places[spec.name]} and in "
                    f"{file.name}: a name can be taken once."
                )
            places[spec.name] = file.name


def _index_text(checkpoint: Checkpoint, files: Sequence[PlannedFile]) -> str:
    """The index, written as transformers writes it.

    It is written for a single file too, where transformers does not need it: other engines load
    every safetensors file of a directory that no index restricts, the direction and the originals
    with them.
    """
    specs = [spec for file in files for spec in file.tensors]
    metadata: dict[str, Any] = dict(checkpoint.index_metadata or {})
    metadata["total_size"] = sum(spec.size for spec in specs)
    if isinstance(metadata.get("total_parameters"), int):
        before = sum(entry.elements for entry in checkpoint.tensors.values())
        metadata["total_parameters"] += sum(spec.elements for spec in specs) - before
    weight_map = {spec.name: file.name for file in files for spec in file.tensors}
    index = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
