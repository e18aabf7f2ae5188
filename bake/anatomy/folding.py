"""Folding: what a slot held, what it is pushed by, and what it will hold.

Plans are made of it, and so is the twin's proof that a rewritten base takes a push.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.anatomy.rewriting import Rewritten
from bake.checkpoint.edits import Add, Edit
from bake.sites import Slot

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SlotEdit:
    """One slot of one layer: what it held, what it is pushed by, and what is stored.

    parameter: its name in the model; name: on disk; weight: the name on disk of the matrix that W·v is
    made with, where it is stored as it is. old and delta: float64, in the slot's shape; old is
    zero for a new slot. stored: cast(old + delta) in the stored dtype.
    """

    layer: int
    slot: Slot
    parameter: str
    name: str
    is_new: bool
    old: torch.Tensor
    delta: torch.Tensor
    stored: torch.Tensor
    weight: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: what another strength needs to be folded into the same slot.

        old: the value that a new slot has without a push, where it is the same everywhere.
        """
        first = float(self.old.flatten()[0]) if self.is_new and self.old.numel() else 0.0
        uniform = self.is_new and bool((self.old == first).all())
        return {
            "layer": self.layer,
            "name": self.name,
            "weight": self.weight,
            "through_weight": self.slot.weight is not None,
            "is_new": self.is_new,
            "old": first if uniform else None,
            "scale": self.slot.scale,
            "transposed": self.slot.transposed,
            **({"solved": True} if self.slot.solved else {}),
            "axis": self.slot.axis,
            "span": list(self.slot.span) if self.slot.span else None,
        }

    @property
    def representation_error(self) -> float:
        """‖(stored − old) − delta‖ / ‖delta‖, the inert part of the slot left out."""
        import torch

        weight = torch.ones_like(self.delta)
        if self.slot.inert:
            start, stop = (round(share * len(weight)) for share in self.slot.inert)
            weight[start:stop] = 0
        norm = (self.delta * weight).norm()
        error = ((self.stored.double() - self.old - self.delta) * weight).norm()
        return float(error / norm) if norm > 0 else 0.0


def fold_push(
    rewritten: Rewritten,
    vectors: Mapping[int, torch.Tensor],
    read: Callable[[str], torch.Tensor],
) -> tuple[SlotEdit, ...]:
    """Return what the slots of a rewritten base hold with a push {layer: (hidden_size,)}.

    read: returns a tensor of the base by its name on disk, for slots behind a factor.
    """
    added = {edit.name: edit.tensor for edit in rewritten.edits if isinstance(edit, Add)}
    found = []
    for layer in sorted(vectors):
        for slot in rewritten.slots[layer]:
            name = rewritten.names.get(slot.key, slot.bias)
            old = _widen(added[name])
            factor = rewritten.names[slot.weight] if slot.weight is not None else None
            weight = read(factor) if factor is not None else None
            delta = slot.delta(vectors[layer], weight, tuple(old.shape))
            stored = (old + delta).to(added[name].dtype)
            found.append(SlotEdit(layer, slot, slot.bias, name, True, old, delta, stored, factor))
    return tuple(found)


def place_push(rewritten: Rewritten, folded: Sequence[SlotEdit]) -> Iterator[Edit]:
    """Yield a rewritten base's edits, with the folded slots in the place of the empty ones."""
    stored = {edit.name: edit.stored for edit in folded}
    for edit in rewritten.edits:
        if isinstance(edit, Add) and edit.name in stored:
            yield Add(edit.name, stored[edit.name])
        else:
            yield edit


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64; one number seen as a large matrix stays one number."""
    if tensor.numel() > 1 and not any(tensor.stride()):
        return tensor[(0,) * tensor.ndim].double().expand(tensor.shape)
    return tensor.double()
