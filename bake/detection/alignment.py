"""A base as the suspect has it: under its names, in the form of another architecture if need be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bake.anatomy import SiteRoute
from bake.anatomy.base import Base
from bake.checkpoint.edits import Add, Drop, Edit, Merge, Patch, Rename, Transform
from bake.checkpoint.ranged import RangedTensors
from bake.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Read = Callable[[int | None], "torch.Tensor"]
_LAYER = re.compile(r"\.(\d+)\.")
PROBED_ROWS = 4  # of every matrix on the Hub


@dataclass(frozen=True)
class Aligned:
    """The base's tensors under the suspect's names.

    readers: {name: rows or None for all → the tensor}. shapes: of each. rewritten_as: the architecture
    that the base had to be written as, or "extra layers"; None where it is the suspect's own. inserted: the
    route whose slots are in layers that the base does not have; None where there are none. origin: the
    base's own tensors.
    """

    readers: Mapping[str, Read]
    shapes: Mapping[str, tuple[int, ...]]
    rewritten_as: str | None = None
    inserted: SiteRoute | None = None
    origin: RangedTensors | None = field(default=None, repr=False)

    def prefetch(self, names: Sequence[str]) -> None:
        """Fetch the few rows of tensors that are compared, where they are the base's own."""
        if self.origin is not None and self.rewritten_as is None:
            self.origin.prefetch(names, PROBED_ROWS)


def align(base: Base, tensors: RangedTensors, suspect: Base, own: RangedTensors) -> Aligned:
    """Return a base as the suspect has it: by a host that bake knows, or with extra layers.

    tensors, own: the base's and the suspect's.
    """
    checkpoint = base.checkpoint
    readers: dict[str, Read] = {name: _reader(tensors, name) for name in checkpoint.tensors}
    shapes = {name: tuple(entry.shape) for name, entry in checkpoint.tensors.items()}
    anatomy, model_type = base.anatomy, suspect.anatomy.model_type
    if suspect.anatomy.layer_count > anatomy.layer_count:
        return _align_inserted(base, tensors, own, readers, shapes)
    rewriter = next(
        (
            route.rewriter
            for route in anatomy.routes
            if route.rewriter is not None and route.rewriter.name == model_type
        ),
        None,
    )
    if rewriter is None:
        return Aligned(readers, shapes, origin=tensors)
    rewritten = rewriter.rewrite(checkpoint, anatomy.config, range(anatomy.layer_count))
    if model_type != anatomy.model_type:
        _apply(rewritten.edits, tensors, readers, shapes)
        return Aligned(readers, shapes, model_type, origin=tensors)
    slots = {slot.bias for parts in rewritten.slots.values() for slot in parts}
    if not {rewritten.names.get(name, name) for name in slots} <= own.checkpoint.tensors.keys():
        return Aligned(readers, shapes, origin=tensors)
    # A family that hosts itself: the suspect has slots where the base has nothing.
    _apply(rewritten.edits, tensors, readers, shapes)
    route = next(entry for entry in anatomy.routes if entry.rewriter is rewriter)
    slots_only = replace(route, slots=rewritten.slots, rewriter=None)
    return Aligned(readers, shapes, f"{model_type} with more inputs", slots_only, origin=tensors)


def _align_inserted(
    base: Base,
    tensors: RangedTensors,
    own: RangedTensors,
    readers: dict[str, Read],
    shapes: dict[str, tuple[int, ...]],
) -> Aligned:
    """Return a base with the extra layers that bake would add where the suspect has its own."""
    layers = find_inserted(own, tensors)
    try:
        route = base.anatomy.choose("mlp_out", route="insert")
    except UnsupportedError:
        route = None
    if not layers or route is None or route.rewriter is None:
        return Aligned(readers, shapes, origin=tensors)
    rewritten = route.rewriter.rewrite(base.checkpoint, base.anatomy.config, layers)
    _apply(rewritten.edits, tensors, readers, shapes)
    slots = replace(route, slots=rewritten.slots, layers=tuple(layers), rewriter=None)
    return Aligned(readers, shapes, "extra layers", slots, origin=tensors)


def find_inserted(own: RangedTensors, base: RangedTensors) -> list[int]:
    """Return the base's layers after which the suspect has one more; none where its layers are others'.

    A layer of the suspect is the base's next one where a row of its largest matrix is.
    """
    import torch

    mine, theirs = _by_layer(own), _by_layer(base)
    if not mine or 0 not in theirs:
        return []
    common = set.intersection(*(set(held) for held in (*mine.values(), *theirs.values())))
    sizes = {part: base.checkpoint.entry(name).size for part, name in theirs[0].items()}
    matrices = [part for part in common if len(base.checkpoint.entry(theirs[0][part]).shape) == 2]
    if not matrices:
        return []
    key = max(matrices, key=lambda part: (sizes[part], part))
    found, following = [], 0
    for layer in sorted(mine):
        row = own.rows(mine[layer][key], 1).double()
        if following in theirs and torch.equal(base.rows(theirs[following][key], 1).double(), row):
            following += 1
        else:
            found.append(following - 1)
    fits = following == len(theirs) and found and found[0] >= 0
    return found if fits and len(set(found)) == len(found) else []


def _by_layer(tensors: RangedTensors) -> dict[int, dict[str, str]]:
    """Return {layer: {the rest of a tensor's name: its name}}."""
    found: dict[int, dict[str, str]] = {}
    for name in tensors.checkpoint.tensors:
        match = _LAYER.search(name)
        if match:
            found.setdefault(int(match[1]), {})[name[match.end() :]] = name
    return found


def _apply(
    edits: Iterable[Edit],
    tensors: RangedTensors,
    readers: dict[str, Read],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """Turn readers of the base into readers of what the edits make of it."""
    old_readers, old_shapes = dict(readers), dict(shapes)
    new_readers: dict[str, Read] = {}
    new_shapes: dict[str, tuple[int, ...]] = {}
    for edit in edits:
        if isinstance(edit, Add | Patch):
            new_readers[edit.name] = _held(edit.tensor)
            new_shapes[edit.name] = tuple(edit.tensor.shape)
            continue
        for name in edit.names if isinstance(edit, Merge) else (edit.name,):
            readers.pop(name, None)
            shapes.pop(name, None)
        if isinstance(edit, Rename):
            new_readers[edit.new_name] = old_readers[edit.name]
            new_shapes[edit.new_name] = old_shapes[edit.name]
        elif not isinstance(edit, Drop):
            for name, shape in edit.outputs.items():
                new_readers[name] = _computed(tensors, edit, name)
                new_shapes[name] = tuple(shape)
    readers |= new_readers
    shapes |= new_shapes


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

    cast: whether what is the same is the base's values in another dtype. probed: how many matrices were
    compared in a few rows only, because the suspect is on the Hub.
    """

    changed: tuple[str, ...]
    added: tuple[str, ...]
    gone: tuple[str, ...]
    cast: bool
    probed: int = 0


def compare(
    suspect: RangedTensors, base: Aligned, same: frozenset[str] = frozenset()
) -> Comparison:
    """Compare every tensor, in the suspect's dtype; of matrices on the Hub a few rows.

    same: tensors that need not be read, because the files that they lie in are known to be the same.
    """
    cast, probed = False, 0
    names = suspect.checkpoint.tensors
    common = [name for name in names if name in base.readers and name not in same]
    changed = [name for name in common if base.shapes[name] != tuple(names[name].shape)]
    common = [name for name in common if base.shapes[name] == tuple(names[name].shape)]
    suspect.prefetch(common, PROBED_ROWS)
    base.prefetch(common)
    for name in common:
        few = None if suspect.is_here(name) else PROBED_ROWS
        probed += few is not None and len(names[name].shape) > 1
        own = suspect.read(name) if few is None else suspect.rows(name, few)
        other = base.readers[name](few)
        if own.dtype != other.dtype:
            cast = True
        if not bool((other.to(own.dtype) == own).all()):
            changed.append(name)
    return Comparison(
        tuple(changed),
        tuple(name for name in names if name not in base.readers),
        tuple(name for name in base.readers if name not in names),
        cast,
        probed,
    )
