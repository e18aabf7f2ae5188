"""What a thin bake needs: a base and a route for which no byte of the base's weights is read.

For a model that fits no machine at hand, or whose weights lie elsewhere: a direction file, a saved
calibration and a config flag that creates the slots say everything. The directory lacks the base's
shards, its index lists them under the names that they must get, and nothing is proven until they are
there: `completion` does that.
"""

from __future__ import annotations

from bake.anatomy import Anatomy, SiteRoute
from bake.anatomy.base import Base
from bake.errors import CheckpointError, UnsupportedError
from bake.sites import Slot


def check_base(base: Base) -> None:
    """Raise CheckpointError for a base without safetensors shards that could be put beside it."""
    if base.checkpoint.pickled:
        raise CheckpointError(
            f"{base.checkpoint.model_id} has no safetensors, only pickled weights that bake converts: "
            "leave --thin out."
        )


def check_route(anatomy: Anatomy, route: SiteRoute) -> None:
    """Raise UnsupportedError where the slots are not new, or need weights to be computed."""
    if is_thin(route):
        return
    if route.rewriter is not None:
        reason = f"the weights are rewritten ({route.route}: {route.rewriter.name})"
    elif any(slot.weight for slot in _slots(route)):
        reason = "it is folded through a weight matrix"
    else:
        reason = "its bias exists already, so a base shard has to be patched"
    possible = ", ".join(f"--site {entry.site}" for entry in anatomy.routes if is_thin(entry))
    raise UnsupportedError(
        f"{route.site} of {anatomy.model_type} cannot be baked thin: {reason}; "
        f"thin here: {possible or 'no site'}"
    )


def is_thin(route: SiteRoute) -> bool:
    """Tell whether a route needs no byte of the base: every slot is new and takes the push itself."""
    slots = _slots(route)
    return (
        route.rewriter is None
        and not any(slot.weight for slot in slots)
        and {slot.bias for slot in slots} <= set(route.new_parameters)
    )


def _slots(route: SiteRoute) -> list[Slot]:
    return [slot for slots in route.slots.values() for slot in slots]
