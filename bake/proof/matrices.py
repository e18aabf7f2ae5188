"""The matrices of an ablation in a proof: hooked, exact, and as they were stored."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bake.anatomy.base import Base
from bake.anatomy.flags import with_flags
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.hooks import ablated
from bake.models.forward import LoadedModel
from bake.models.streaming import hold_computed
from bake.plan.ablation import AblationPlan
from bake.writes import Removal, Write, WriteMap

if TYPE_CHECKING:
    import torch
    from torch import nn

# Bounds on the relative error of what is stored. Every matrix that writes is rounded again, where a push
# rounds one bias: see docs/ablation.md for what was measured.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class HookedAblation:
    """An ablation, as an intervention; it has one strength, and padding has no part in it.

    before_push: as of `bake.hooks.ablated`.
    """

    writes: WriteMap
    ablation: Removal
    before_push: bool = False
    scales: bool = False

    def hooks(
        self, model: nn.Module, *, factor: float = 1.0, mask: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Return the context in which the subspace is taken out, at every position."""
        return ablated(model, self.writes, self.ablation, before_push=self.before_push)


@dataclass(frozen=True)
class Weights:
    """The matrices of an ablation, in the base and as they were written."""

    plan: AblationPlan
    checkpoint: Checkpoint
    base: DiskNames
    baked: DiskNames

    def writes(self) -> tuple[tuple[Write, int | None], ...]:
        """Return what was edited, with the layer of each."""
        return self.plan.writes.of(self.plan.ablation)

    def exact(self, write: Write, layer: int | None, rows: slice | None = None) -> torch.Tensor:
        """Return what a parameter, or rows of it, should be: in float64 from the base, then float32."""
        import torch

        ablation, name = self.plan.ablation, self.base.find(write.parameter)
        by_rows = rows is not None and name is not None and layer is None and write.axis == -1
        if rows is not None and name is not None and by_rows:
            read = self.checkpoint.read_rows(name, rows.start, rows.stop)
        else:
            read = self.base.read(write.parameter)
        found = ablation.edit(read, write, layer, torch.float32)
        return found if rows is None or by_rows else found[rows]

    def head_is_kept(self) -> bool:
        """Whether a head that was untied holds what the embedding was."""
        import torch

        untying = self.plan.writes.untying
        if untying is None or not self.plan.untied_bytes:
            return True
        found, wanted = self.baked.read(untying.head), self.base.read(untying.embedding)
        return torch.equal(found, wanted.to(found.dtype))


def open_weights(base: Base, baked: Checkpoint, plan: AblationPlan) -> Weights:
    """Return the matrices of an ablation in the base and in what was written."""
    config = base.anatomy.config
    untying = plan.writes.untying if plan.untied_bytes else None
    changed = with_flags(config, untying.flags) if untying else config
    return Weights(
        plan,
        base.checkpoint,
        DiskNames(base.checkpoint, build_on_meta(config)),
        DiskNames(baked, build_on_meta(changed)),
    )


def hold_exact(
    loaded: LoadedModel, weights: Weights, pushed: Collection[str] = ()
) -> tuple[bool, float]:
    """Give every edited matrix its exact value, one at a time; compare what is stored with it.

    pushed: parameters that hold a push too, which are neither held nor compared. Returns whether all of the
    others are stored right bit for bit, and the largest rounding error of one, relative to what was taken
    out of it.
    """
    import torch

    exact, worst = weights.head_is_kept(), 0.0
    for write, layer in weights.writes():
        if write.parameter in pushed:
            continue
        wanted = weights.exact(write, layer)
        found = weights.baked.read(write.parameter)
        exact = exact and torch.equal(found, wanted.to(found.dtype))
        taken = (wanted - weights.base.read(write.parameter).float()).norm()
        if taken > 0:
            worst = max(worst, float((found.float() - wanted).norm() / taken))
        compute = partial(weights.exact, write, layer)
        hold_computed(loaded.model, loaded.weights, write.parameter, compute)
    return exact, worst
