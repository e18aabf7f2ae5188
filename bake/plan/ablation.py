"""The plan of an ablation: which matrices change and how, decided from headers before any weight moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.anatomy import Anatomy
from bake.anatomy.erasure import erase
from bake.anatomy.folding import SlotEdit
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Edit
from bake.checkpoint.quantization import quantization_method
from bake.errors import UnsupportedError
from bake.plan.dtypes import FLOAT_DTYPES, convert_others, dtype_changes
from bake.writes import Removal, Silence, WriteMap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AblationPlan:
    """Everything that an ablation changes. What is not named here keeps its bytes.

    writes: what writes to the residual stream. edited: the tensors that something is taken out of. dtype:
    in which the whole is stored, or "as the base". slot_edits, added: the biases that add means, and the
    tensors that are created for them.
    """

    ablation: Removal
    writes: WriteMap
    edits: tuple[Edit, ...]
    config_changes: Mapping[str, Any]
    edited: tuple[str, ...]
    stored_dtype: str
    dtype: str
    untied_bytes: int
    carries_drafts: bool = False  # What they write would not be ablated.
    slot_edits: tuple[SlotEdit, ...] = ()
    added: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`: names and config keys, not matrices."""
        return {
            "added": [*self.untied_heads, *self.added],
            "patched": sorted({*self.edited, *(e.name for e in self.slot_edits if not e.is_new)}),
            "config_changes": dict(self.config_changes),
            "dtype": self.dtype,
            "slots": [edit.to_dict() for edit in self.slot_edits],
        }

    def exact(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """Return what is left of a parameter, in float64; the weight itself where it is none of them."""
        import torch

        for write, layer in self.writes.of(self.ablation):
            if write.parameter == parameter:
                return self.ablation.edit(weight, write, layer, torch.float64)
        return weight

    @property
    def untied_heads(self) -> list[str]:
        """The head that is stored by itself now; none where it was already."""
        untying = self.writes.untying if self.untied_bytes else None
        return [untying.head] if untying else []

    def describe(self) -> str:
        """Return what is taken out of what, in a sentence."""
        return self.ablation.describe(len(self.edited))

    def untied(self) -> str | None:
        """Return what untying the head costs, in a sentence; None where nothing is untied."""
        if not self.untied_bytes:
            return None
        return (
            "the output head shares the embedding's matrix and has to keep it: it is stored by itself, "
            f"{self.untied_bytes / 1e6:.1f} MB more"
        )


def plan_ablation(
    checkpoint: Checkpoint, anatomy: Anatomy, ablation: Removal, *, dtype: str | None = None
) -> AblationPlan:
    """Decide every edit. dtype: "float32" stores the whole checkpoint so; None keeps the base's.

    Raises UnsupportedError where the architecture cannot be ablated exactly, where a tensor is not stored
    as floats, and for a quantised base; CheckpointError where the checkpoint lacks a tensor.
    """
    method = quantization_method(checkpoint.config)
    if method is not None:
        raise UnsupportedError(
            f"{checkpoint.model_id} is quantised ({method}), and an ablation edits its matrices: ablate "
            "the unquantised base"
        )
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UnsupportedError(f"unknown dtype {dtype!r}; one of {', '.join(FLOAT_DTYPES)}")
    # Zero is zero behind a norm too, so heads and neurons ask for no scope.
    scope = None if isinstance(ablation, Silence) else ablation.scope
    writes = anatomy.ablation.choose(scope, anatomy.model_type)
    code = FLOAT_DTYPES[dtype] if dtype else None
    edits, flags = erase(checkpoint, anatomy.config, writes, ablation, code)
    edited = tuple(sorted(edit.name for edit in edits))
    copies = [edit for edit in edits if len(edit.outputs) > 1]
    used = code or checkpoint.entry(edited[0]).dtype
    converted = (
        [edit for edit in convert_others(checkpoint, code, {}) if edit.name not in edited]
        if code
        else []
    )
    return AblationPlan(
        ablation,
        writes,
        (*edits, *converted),
        {**flags, **dtype_changes(checkpoint, dtype)},
        edited,
        next(name for name, known in FLOAT_DTYPES.items() if known == used),
        dtype or "as the base",
        sum(checkpoint.entry(edit.name).size for edit in copies),
    )
