"""`bake detect`: what was baked into a checkpoint, read out of its weights.

Nothing that the suspect says of itself is believed. With a base, tensors are compared: a push is what its
biases hold beyond the base's, turned back through the slots' own arithmetic; an ablation is the subspace
that the changes of all that writes have in common. Without one, only what a model of the family cannot have
by itself is called anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy import Anatomy
from bake.anatomy.base import Base, open_base
from bake.anatomy.flags import parameter_shapes
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.quantization import quantization_method
from bake.checkpoint.ranged import RangedTensors, equal_files
from bake.detection.alignment import PROBED_ROWS, Aligned, Comparison, align, compare
from bake.detection.claims import find_lies
from bake.detection.findings import AblationFound, Detection, PushFound
from bake.detection.recovery import (
    find_loose,
    recover_pushes,
    unusual_biases,
    unusual_flags,
)
from bake.detection.removal import find_ablation, find_common_gap, lost_part
from bake.detection.undoing import check_undoable, write_without
from bake.detection.whose import compare_with, read_known
from bake.directions.direction_file import direction_bytes
from bake.directions.formats.objects import with_lengths
from bake.errors import BakeError, CheckpointError, EquivalenceError, UnsupportedError
from bake.io.atomic import check_file, write_file
from bake.io.safetensors import torch_dtype
from bake.io.staging import check_output
from bake.writes import WriteMap

if TYPE_CHECKING:
    import torch

COHERENT = 0.5  # mean cosine of neighbouring layers, above which created biases are a push
# What the input embedding is called, from the end of its name.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# Of a bias's length, within which it is what an ablation left: a floor, and a part of the residual.
KNOWN_TO, KNOWN_SHARE = 1e-4, 0.1


def detect(
    suspect: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    against: Sequence[str] = (),
    output: str | None = None,
    undo: str | None = None,
) -> Detection:
    """Look for pushes and ablations in a directory or Hub id; see `bake detect --help`.

    Raises CheckpointError where a checkpoint cannot be read, DirectionError for a direction of `against`
    that cannot, and BakeError where a direction is to be written, or something undone, and none was found.
    """
    if undo is not None:
        check_output(Path(undo), overwrite=False)
    if output is not None:
        check_file(Path(output))
    opened = _open(suspect, revision)
    tensors = RangedTensors(opened.checkpoint)
    anatomy = opened.anatomy
    known = read_known(against, anatomy.hidden_size, anatomy.layer_count)
    names = DiskNames(opened.checkpoint, build_on_meta(anatomy.config))
    other = None
    if base is None:
        found = _look_alone(opened, tensors, names)
        read, size = tensors.read_bytes, opened.checkpoint.size
    else:
        other = _open(base, base_revision)
        origin = RangedTensors(other.checkpoint)
        found = _look_beside(opened, tensors, names, other, origin)
        read = tensors.read_bytes + origin.read_bytes
        size = opened.checkpoint.size + other.checkpoint.size
    if found.pushes and known:
        whose, shares = compare_with(found.pushes[0], known)
        found = replace(found, whose=whose, shares=shares)
    found = replace(
        found,
        lies=tuple(find_lies(opened, found)),
        read_bytes=read,
        size_bytes=size,
    )
    if undo is not None:
        check_undoable(found)
    if output is not None:
        _write_direction(found, Path(output))
    if undo is None:
        return found
    flags = {} if other else unusual_flags(anatomy)

    def check(written: Path) -> None:
        again = detect(str(written), base=base, base_revision=base_revision)
        if again.pushes or again.ablations:
            raise EquivalenceError(
                f"without what was found there is still something in it ({again.verdict}), so {undo} is "
                "not written"
            )

    write_without(found, suspect, revision, Path(undo), other, flags, check)
    return replace(found, undone=undo)


def _open(model: str, revision: str | None) -> Base:
    """Open a checkpoint of floats whose tensors have the shapes that its config asks for, headers only.

    Raises UnsupportedError for a quantised one, CheckpointError for a tensor of another shape.
    """
    opened = open_base(model, revision, headers_only=True)
    checkpoint = opened.checkpoint
    method = quantization_method(checkpoint.config)
    if method is not None:
        raise UnsupportedError(
            f"{checkpoint.model_id} is quantised ({method}), and what is packed cannot be compared: give "
            "the checkpoint that it was made of"
        )
    model_on_meta = build_on_meta(opened.anatomy.config)
    names = DiskNames(checkpoint, model_on_meta)
    for parameter, shape in parameter_shapes(model_on_meta).items():
        name = names.find(parameter)
        if name is not None and tuple(checkpoint.entry(name).shape) != tuple(shape):
            raise CheckpointError(
                f"{name} of {checkpoint.model_id} has shape {tuple(checkpoint.entry(name).shape)}, and its "
                f"config asks for {tuple(shape)}: transformers would not load it"
            )
    return opened


def _look_beside(
    opened: Base, tensors: RangedTensors, names: DiskNames, other: Base, origin: RangedTensors
) -> Detection:
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
    writes = _find_writes(anatomy)
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

    pushes = [
        *recover_pushes(tensors, anatomy, names, old, aligned.inserted),
        *find_loose(tensors, anatomy),
    ]
    pushes = [push for push in map(_without_rounding, pushes) if push.vectors and push.fits]
    lost = set() if ablation is None or writes is None else _lost(ablation, writes, names)
    explained = {names.find(p) or p for push in pushes for p in push.parameters} | lost
    strange = sorted(_find_strange(tensors, aligned, compared, explained))
    others = list(_describe_others(opened, compared, sorted(changed - explained), strange))
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


def _look_alone(opened: Base, tensors: RangedTensors, names: DiskNames) -> Detection:
    anatomy = opened.anatomy
    unusual = unusual_biases(anatomy)

    def old(parameter: str, name: str) -> torch.Tensor | None:
        import torch

        if parameter not in unusual:
            return None
        return torch.zeros(tuple(opened.checkpoint.entry(name).shape), dtype=torch.float64)

    pushes = [
        push
        for push in recover_pushes(tensors, anatomy, names, old)
        if push.fits
        and (
            (push.coherence > COHERENT and len(push.vectors) < anatomy.layer_count)
            or push.coherence > 0.9
        )
    ]
    pushes += find_loose(tensors, anatomy)
    writes = _find_writes(anatomy)
    width = anatomy.hidden_size
    ablation = find_common_gap(tensors, names, writes, width) if writes else None
    native = sorted(
        {route.site for route in anatomy.routes if route.route == "native"}
        - {push.site for push in pushes}
    )
    notes = []
    if native and not unusual:
        notes.append(
            f"models of this family have biases of their own at {', '.join(native)}, and a push into them "
            "cannot be told from training without the base: give it with --base"
        )
    notes.append(
        "without a base, only what this family cannot have by itself is found: an ablation of some layers, "
        "and a push into what was trained, are not"
    )
    return Detection(
        opened.to_dict()["id"],
        None,
        tuple(pushes),
        (ablation,) if ablation else (),
        notes=tuple(notes),
        explained=tuple(sorted(_created(opened, names, pushes, unusual))),
    )


def _created(
    opened: Base, names: DiskNames, pushes: Sequence[PushFound], unusual: frozenset[str]
) -> Iterator[str]:
    """Yield the tensors that were created for pushes, whatever they hold."""
    loaded = [push for push in pushes if push.loaded]
    if loaded:
        yield from (name for each in unusual if (name := names.find(each)) is not None)
    for push in pushes:
        if not push.loaded:
            yield from push.parameters


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


def _find_writes(anatomy: Anatomy) -> WriteMap | None:
    try:
        return anatomy.ablation.choose(None, anatomy.model_type)
    except UnsupportedError:
        return None


def _without_rounding(push: PushFound) -> PushFound:
    """Leave out layers whose vectors are next to nothing beside the largest: what rounding leaves."""
    largest = max(push.lengths.values())
    kept = [layer for layer, length in push.lengths.items() if length > 1e-4 * largest]
    return replace(
        push,
        vectors={layer: push.vectors[layer] for layer in kept},
        residuals={layer: push.residuals[layer] for layer in kept},
    )


def _describe_others(
    opened: Base, compared: Comparison, left: Sequence[str], strange: Sequence[str]
) -> Iterator[str]:
    total = len(opened.checkpoint.tensors)
    if left:
        matrices = [name for name in left if len(opened.checkpoint.entry(name).shape) > 1]
        yield (
            f"{len(left)} of {total} tensors ({len(matrices)} matrices) have other values, {left[0]} "
            "the first"
        )
    if strange:
        yield f"{len(strange)} tensors are not the base's, {strange[0]} the first"
    if compared.gone:
        yield f"{len(compared.gone)} of the base's tensors are not there, {compared.gone[0]} the first"


def _write_direction(found: Detection, path: Path) -> None:
    if not found.pushes and not any(each.basis is not None for each in found.ablations):
        raise BakeError(f"no direction was found, so {path} is not written")
    direction = found.pushes[0].direction() if found.pushes else _basis_direction(found.ablations)
    write_file(path, direction_bytes(with_lengths(direction)))


def _basis_direction(ablations: Sequence[AblationFound]) -> Any:
    from bake.directions.direction import Direction

    basis = next(each.basis for each in ablations if each.basis is not None)
    return Direction({None: basis[-1].float()}, "mlp_out", {"method": "detected"})
