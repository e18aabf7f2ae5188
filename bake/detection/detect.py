"""`bake detect`: what was baked into a checkpoint, read out of its weights.

Nothing that the suspect says of itself is believed. With a base, tensors are compared: a push is what its
biases hold beyond the base's, turned back through the slots' own arithmetic; an ablation is the subspace
that the changes of all that writes have in common. Without one, only what a model of the family cannot have
by itself is called anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy.base import Base, open_base
from bake.anatomy.flags import parameter_shapes, unusual_flags
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.quantization import quantization_method
from bake.checkpoint.ranged import RangedTensors
from bake.detection.alone import look_alone
from bake.detection.beside import look_beside
from bake.detection.claims import find_lies
from bake.detection.findings import LAYERS, AblationFound, Detection
from bake.detection.measuring import measure
from bake.detection.undoing import check_undoable, write_without
from bake.detection.whose import compare_with, read_known
from bake.directions.direction_file import direction_bytes
from bake.directions.formats.objects import with_lengths
from bake.errors import BakeError, CheckpointError, EquivalenceError, UnsupportedError
from bake.io.atomic import check_file, write_file
from bake.io.staging import check_output

if TYPE_CHECKING:
    pass


def detect(
    suspect: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    against: Sequence[str] = (),
    output: str | None = None,
    undo: str | None = None,
    measures: str | None = None,
) -> Detection:
    """Look for pushes and ablations in a directory or Hub id; see `bake detect --help`.

    Raises CheckpointError where a checkpoint cannot be read, DirectionError for a direction of `against`
    that cannot, and BakeError where a direction is to be written, or something undone, and none was found.
    measures: calibration prompts on which a push's strength is measured.
    """
    if undo is not None:
        check_output(Path(undo), overwrite=False)
    if output is not None:
        check_file(Path(output))
    opened, tensors, names = open_suspect(suspect, revision)
    anatomy = opened.anatomy
    known = read_known(against, anatomy.hidden_size, anatomy.layer_count)
    other = None
    if base is None:
        found = look_alone(opened, tensors, names)
        read, size = tensors.read_bytes, opened.checkpoint.size
    else:
        other = _open(base, base_revision)
        origin = RangedTensors(other.checkpoint)
        found = look_beside(opened, tensors, names, other, origin)
        read = tensors.read_bytes + origin.read_bytes
        size = opened.checkpoint.size + other.checkpoint.size
    if measures is not None:
        found = _with_strengths(found, suspect, revision, base, base_revision, measures)
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
    flags = {} if other else unusual_flags(anatomy.config)

    def check(written: Path) -> None:
        again = detect(str(written), base=base, base_revision=base_revision)
        if again.pushes or again.ablations:
            raise EquivalenceError(
                f"without what was found there is still something in it ({again.verdict}), so {undo} is "
                "not written"
            )

    write_without(found, suspect, revision, Path(undo), other, flags, check)
    return replace(found, undone=undo)


def _with_strengths(
    found: Detection,
    suspect: str,
    revision: str | None,
    base: str | None,
    base_revision: str | None,
    prompts: str,
) -> Detection:
    """Return a finding whose pushes know their strength, where the model can be run without them."""
    if base is None and any(push.kind == LAYERS for push in found.pushes):
        note = "layers that were put in are not taken off to measure how strong they are: give the base"
        return replace(found, notes=(*found.notes, note))
    model, at = (suspect, revision) if base is None else (base, base_revision)
    pushes = tuple(measure(each, model, at, prompts, alone=base is None) for each in found.pushes)
    return replace(found, pushes=pushes)


def open_suspect(
    suspect: str, revision: str | None = None
) -> tuple[Base, RangedTensors, DiskNames]:
    """Open a checkpoint to look at: what it is, its tensors, and their names; nothing is read yet."""
    opened = _open(suspect, revision)
    names = DiskNames(opened.checkpoint, build_on_meta(opened.anatomy.config))
    return opened, RangedTensors(opened.checkpoint), names


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


def _write_direction(found: Detection, path: Path) -> None:
    if not found.pushes and not any(each.basis is not None for each in found.ablations):
        raise BakeError(f"no direction was found, so {path} is not written")
    direction = found.pushes[0].direction() if found.pushes else _basis_direction(found.ablations)
    write_file(path, direction_bytes(with_lengths(direction)))


def _basis_direction(ablations: Sequence[AblationFound]) -> Any:
    from bake.directions.direction import Direction

    basis = next(each.basis for each in ablations if each.basis is not None)
    return Direction({None: basis[-1].float()}, "mlp_out", {"method": "detected"})
