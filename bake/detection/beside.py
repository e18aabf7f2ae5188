"""What a suspect holds beyond its base, and what it lacks of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from bake.anatomy.base import Base
from bake.checkpoint.names import DiskNames
from bake.checkpoint.ranged import RangedTensors, equal_files
from bake.detection.alignment import PROBED_ROWS, Aligned, Comparison, align, compare
from bake.detection.differences import describe_differences
from bake.detection.findings import AblationFound, Detection, PushFound
from bake.detection.recovery import find_loose, recover_pushes
from bake.detection.removal import find_ablation, find_writes, lost_part
from bake.errors import CheckpointError
from bake.io.safetensors import torch_dtype
from bake.writes import WriteMap

if TYPE_CHECKING:
    import torch

# What the input embedding is called, from the end of its name.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# Of a bias's length, within which it is what an ablation left: a floor, and a part of the residual.
KNOWN_TO, KNOWN_SHARE = 1e-4, 0.1


def look_beside(
    opened: Base, tensors: RangedTensors, names: DiskNames, other: Base, origin: RangedTensors
) -> Detection:
    """Return what a suspect holds beyond a base, and what it lacks of it.

    tensors, names: the suspect's. origin: the base's tensors. Raises CheckpointError for a base of another
    width.
    """
    anatomy = opened.anatomy
    model_type = anatomy.model_type
    if other.anatomy.hidden_size != anatomy.hidden_size:
        raise CheckpointError(
            f"{opened.checkpoint.model_id} is {anatomy.hidden_size} wide and {other.checkpoint.model_id} "
            f"{other.anatomy.hidden_size}: it was made of another model"
        )
    aligned = align(other, origin, opened, tensors)
    if other.anatomy.model_type != model_type and aligned.rewritten_as is None:
        unlike = (
            f"it is a {model_type} and the base a {other.anatomy.model_type}, which bake knows no exact "
            "way between"
        )
        return Detection(opened.to_dict()["id"], other.to_dict()["id"], others=(unlike,))
    equal = equal_files(other.checkpoint, opened.checkpoint) if not aligned.rewritten_as else set()
    compared = compare(tensors, aligned, _known_same(opened, other, equal))
    changed = frozenset(compared.changed)
    writes = find_writes(anatomy)
    ablation = find_ablation(tensors, aligned, names, writes, changed) if writes else None

    def old(_parameter: str, name: str) -> torch.Tensor | None:
        import torch

        shape = tuple(opened.checkpoint.entry(name).shape)
        if name not in aligned.readers:
            return torch.zeros(shape, dtype=torch.float64)
        if aligned.shapes[name] != shape:
            return None
        dtype = torch_dtype(opened.checkpoint.entry(name).dtype)
        held = aligned.readers[name](None).double()
        if ablation is None or name not in changed:
            return held.to(dtype).double()
        left, stored = lost_part(ablation, held), tensors.read(name).double()
        # The subspace is known as well as the matrices' rounding lets it be.
        unknown = (KNOWN_TO + KNOWN_SHARE * ablation.residual) * held.norm()
        return stored if (stored - left).norm() <= unknown else left.to(dtype).double()

    tensors.prefetch(name for name in compared.added if name.endswith(".bias"))
    pushes = [
        *recover_pushes(tensors, anatomy, names, old, aligned.inserted),
        *find_loose(tensors, anatomy),
    ]
    pushes = [push for push in map(_without_rounding, pushes) if push.vectors and push.fits]
    lost = set() if ablation is None or writes is None else _lost(ablation, writes, names)
    explained = {names.find(p) or p for push in pushes for p in push.parameters} | lost
    strange = sorted(_find_strange(tensors, aligned, compared, explained))
    others = list(
        describe_differences(tensors, aligned, compared, sorted(changed - explained), strange)
    )
    if others:  # Training moves the biases of all layers alike, but it makes none.
        pushes = [push for push in pushes if not {*push.parameters} & {*aligned.readers}]
    notes = []
    if compared.probed:
        notes.append(
            f"of {compared.probed} matrices on the Hub {PROBED_ROWS} rows were compared: a change in "
            "others is not seen; download the checkpoint to compare it whole"
        )
    if compared.cast:
        notes.append("the values are the base's in another dtype, where nothing else is said")
    if aligned.rewritten_as:
        notes.append(
            f"the base ({other.anatomy.model_type}) was compared as {aligned.rewritten_as}, which computes "
            "the same"
        )
    return Detection(
        opened.to_dict()["id"],
        other.to_dict()["id"],
        tuple(pushes),
        (ablation,) if ablation else (),
        tuple(others),
        tuple(notes),
        explained=tuple(sorted(_explained(names, pushes, lost, compared, strange))),
        rewritten_as=aligned.rewritten_as,
    )


def _known_same(opened: Base, other: Base, equal: Set[tuple[str, str]]) -> frozenset[str]:
    """Return the names of tensors that lie at the same place of files of one SHA-256, by the Hub's word.

    Of files that are here a name is no proof of their content, so they are compared.
    """
    theirs = other.checkpoint.tensors
    return frozenset(
        name
        for name, entry in opened.checkpoint.tensors.items()
        if name in theirs
        and (theirs[name].file, entry.file) in equal
        and theirs[name].start == entry.start
        and not (opened.checkpoint.directory / entry.file).is_file()
    )


def _lost(ablation: AblationFound, writes: WriteMap, names: DiskNames) -> set[str]:
    """Return the tensors that an ablation changes: the matrices it was found in, and biases that write."""
    found = (names.find(write.parameter) for write in writes.every)
    biases = {name for name in found if name is not None and name.endswith(".bias")}
    return {*ablation.strengths, *ablation.columns, *(biases if ablation.basis is not None else ())}


def _explained(
    names: DiskNames,
    pushes: Sequence[PushFound],
    lost: Set[str],
    compared: Comparison,
    strange: Sequence[str],
) -> Iterator[str]:
    """Yield the tensors that are others than the base's because of what was found."""
    pushed = {names.find(p) or p for push in pushes for p in push.parameters}
    yield from (name for name in compared.changed if name in pushed or name in lost)
    if (
        pushes or lost
    ):  # What was created comes with its flags: all of it, or a head that was untied.
        yield from (name for name in compared.added if name not in strange)


def _find_strange(
    tensors: RangedTensors, aligned: Aligned, compared: Comparison, explained: Set[str]
) -> Iterator[str]:
    """Yield the suspect's tensors that the base has not, but biases of zeros and a head that was untied."""
    for name in compared.added:
        if name in explained:
            continue
        if name.endswith(".bias") and not tensors.read(name).any():
            continue
        tied = _find_tied(aligned, name)
        own = tensors.rows(name, PROBED_ROWS)
        if tied is None or not bool(
            (aligned.readers[tied](PROBED_ROWS).to(own.dtype) == own).all()
        ):
            yield name


def _find_tied(aligned: Aligned, name: str) -> str | None:
    """Return the base's input embedding, where a tensor is the output head that may share it there."""
    if not name.endswith(("lm_head.weight", "embed_out.weight")):
        return None
    return next((each for each in aligned.readers if each.endswith(EMBEDDINGS)), None)


def _without_rounding(push: PushFound) -> PushFound:
    """Leave out layers whose vectors are next to nothing beside the largest: what rounding leaves."""
    largest = max(push.lengths.values())
    kept = [layer for layer, length in push.lengths.items() if length > 1e-4 * largest]
    return replace(
        push,
        vectors={layer: push.vectors[layer] for layer in kept},
        residuals={layer: push.residuals[layer] for layer in kept},
    )
