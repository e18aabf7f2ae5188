"""The plan of a mean-ablation: columns set to zero, and a bias that adds what they write of their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bake.anatomy import Anatomy
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Add
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.errors import UnsupportedError
from bake.plan.ablation import AblationPlan, plan_ablation
from bake.plan.plan import make_plan
from bake.writes import Removal, Silence

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Constants:
    """What layers add at a site, whatever they read: {layer: (hidden_size,) float64}."""

    vectors: Mapping[int, torch.Tensor]
    multiplier: float = 1.0


def plan_removal(
    checkpoint: Checkpoint, anatomy: Anatomy, removal: Removal, *, dtype: str | None = None
) -> AblationPlan:
    """Decide every edit of a removal, the means of heads or neurons included; raises as `plan_ablation`.

    Raises UnsupportedError where a mean has no bias to go to.
    """
    zero = plan_ablation(checkpoint, anatomy, removal, dtype=dtype)
    if not isinstance(removal, Silence) or removal.means is None:
        return zero
    names = DiskNames(checkpoint, build_on_meta(anatomy.config))
    site = "attn_out" if removal.heads else "mlp_out"
    routes = [entry for entry in anatomy.routes if entry.site == site and entry.rewriter is None]
    if not routes:
        raise UnsupportedError(
            f"{anatomy.model_type} has no bias at {site} that could add the mean; leave --mean out, and "
            "they write nothing"
        )
    plan = make_plan(
        checkpoint,
        anatomy,
        routes[0],
        Constants(removal.constants(names.read)),
        dtype=dtype,
        ablation=zero,
    )
    return replace(
        zero,
        edits=plan.edits,
        config_changes=plan.config_changes,
        slot_edits=plan.slot_edits,
        added=tuple(edit.name for edit in plan.edits if isinstance(edit, Add)),
    )
