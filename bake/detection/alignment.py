"""A base as the suspect has it: under its names, in the form of another architecture if need be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.anatomy.base import Base
from bake.checkpoint.edits import Add, Drop, Merge, Patch, Rename, Transform
from bake.checkpoint.ranged import RangedTensors

if TYPE_CHECKING:
    import torch

Read = Callable[[int | None], "torch.Tensor"]
PROBED_ROWS = 4  # of every matrix, in which a change shows


@dataclass(frozen=True)
class Aligned:
    """The base's tensors under the suspect's names.

    readers: {name: rows or None for all → the tensor}. shapes: of each. rewritten_as: the architecture that
    the base had to be written as; None where it is the suspect's.
    """

    readers: Mapping[str, Read]
    shapes: Mapping[str, tuple[int, ...]]
    rewritten_as: str | None = None


def align(base: Base, tensors: RangedTensors, model_type: str) -> Aligned:
    """Return a base as a suspect of an architecture has it, by a host that bake knows where they differ."""
    checkpoint = base.checkpoint
    readers: dict[str, Read] = {name: _reader(tensors, name) for name in checkpoint.tensors}
    shapes = {name: tuple(entry.shape) for name, entry in checkpoint.tensors.items()}
    rewriter = next(
        (
            route.rewriter
            for route in base.anatomy.routes
            if route.rewriter is not None and route.rewriter.name == model_type
        ),
        None,
    )
    if model_type == base.anatomy.model_type or rewriter is None:
        return Aligned(readers, shapes)
    every = range(base.anatomy.layer_count)
    for edit in rewriter.rewrite(checkpoint, base.anatomy.config, every).edits:
        if isinstance(edit, Add | Patch):
            readers[edit.name] = _held(edit.tensor)
            shapes[edit.name] = tuple(edit.tensor.shape)
        elif isinstance(edit, Rename):
            readers[edit.new_name] = readers.pop(edit.name)
            shapes[edit.new_name] = shapes.pop(edit.name)
        elif isinstance(edit, Drop):
            readers.pop(edit.name)
            shapes.pop(edit.name)
        else:
            for name in edit.names if isinstance(edit, Merge) else (edit.name,):
                readers.pop(name, None)
                shapes.pop(name, None)
            for name, shape in edit.outputs.items():
                readers[name], shapes[name] = _computed(tensors, edit, name), tuple(shape)
    return Aligned(readers, shapes, model_type)


def _reader(tensors: RangedTensors, name: str) -> Read:
    return lambda rows: tensors.read(name) if rows is None else tensors.rows(name, rows)


def _held(tensor: torch.Tensor) -> Read:
    return lambda rows: tensor if rows is None else middle(tensor, rows)


def _computed(tensors: RangedTensors, edit: Transform | Merge, name: str) -> Read:
    def read(rows: int | None) -> torch.Tensor:
        if isinstance(edit, Merge):
            made = edit.function({each: tensors.read(each) for each in edit.names})
        else:
            made = edit.function(tensors.read(edit.name))
        return made[name] if rows is None else middle(made[name], rows)

    return read


def middle(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Return at most so many rows from the middle, as `RangedTensors.rows` does."""
    if tensor.ndim < 2 or len(tensor) <= rows:
        return tensor
    start = (len(tensor) - rows) // 2
    return tensor[start : start + rows]


@dataclass(frozen=True)
class Comparison:
    """Which of the suspect's tensors are not the base's. added: not in the base; gone: not in the suspect.

    cast: whether what is the same is the base's values in another dtype.
    """

    changed: tuple[str, ...]
    added: tuple[str, ...]
    gone: tuple[str, ...]
    cast: bool


def compare(
    suspect: RangedTensors, base: Aligned, same: frozenset[str] = frozenset()
) -> Comparison:
    """Compare every vector whole and a few rows of every matrix, in the suspect's dtype.

    same: tensors that need not be read, because the files that they lie in are known to be the same.
    """
    changed, cast = [], False
    names = suspect.checkpoint.tensors
    for name in names:
        if name not in base.readers or name in same:
            continue
        own = suspect.rows(name, PROBED_ROWS)
        if base.shapes[name] != tuple(names[name].shape):
            changed.append(name)
            continue
        other = base.readers[name](PROBED_ROWS)
        if own.dtype != other.dtype:
            cast = True
        if not bool((other.to(own.dtype) == own).all()):
            changed.append(name)
    return Comparison(
        tuple(changed),
        tuple(name for name in names if name not in base.readers),
        tuple(name for name in base.readers if name not in names),
        cast,
    )
