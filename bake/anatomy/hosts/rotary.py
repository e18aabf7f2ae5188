"""Partial rotary positions in a host that rotates every dimension of a head.

The dimensions that the base leaves alone are rotated too, by an angle of nothing: `longrope` divides each
pair's frequency by a factor of its own, and one large enough leaves cos 1 and sin 0. The factors of the
others make up for the exponents, which the host counts over the whole head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import head_size, rotary_share
from bake.anatomy.hosts.conversion import Computed, Shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# At position 1e6 the angle is 1e-14, below half a unit in the last place of 1 even in float64's cosine;
# times the base's largest frequency divisor it stays a float32.
STANDSTILL = 1e20


def lost_scaling(config: PreTrainedConfig) -> str | None:
    """Say that frequencies which are scaled already cannot be scaled again; None where they are not."""
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    return None if kind == "default" else f"its rotary frequencies are scaled already ({kind})"


def rotated_size(config: PreTrainedConfig) -> int:
    """Return how many dimensions of a head rotate with the position."""
    return int(head_size(config) * rotary_share(config))


def full_rotation(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config keys with which a host that rotates whole heads rotates what the base does.

    Frequencies θ^(−2i/r) of the r rotated dimensions, where the host has θ^(−2i/h) of all h divided by the
    i-th factor (transformers' `_compute_longrope_parameters`).
    """
    theta = float(config.rope_parameters["rope_theta"])
    width, rotated = head_size(config), rotated_size(config)
    factors = [theta ** (2 * i / rotated - 2 * i / width) for i in range(rotated // 2)]
    factors += [STANDSTILL] * (width // 2 - rotated // 2)
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": int(config.max_position_embeddings),
        }
    }


def order_for_full_rotation(config: PreTrainedConfig, *, neighbours: bool) -> list[int]:
    """Return which of the base's dimensions stands at each place of a head that rotates as a whole.

    The host rotates dimension i with i + h/2. neighbours: whether the base rotates 2i with 2i + 1, else
    i with i + r/2; what does not rotate fills the places of the pairs that stand still.
    """
    width, rotated = head_size(config), rotated_size(config)
    first = [*range(0, rotated, 2)] if neighbours else [*range(rotated // 2)]
    second = [*range(1, rotated, 2)] if neighbours else [*range(rotated // 2, rotated)]
    middle = rotated + (width - rotated) // 2
    return [*first, *range(rotated, middle), *second, *range(middle, width)]


def reorder(name: str, shape: Shape, width: int, order: list[int]) -> Computed:
    """Reorder the rows of every head: of queries and keys alike, no product of the two changes."""

    def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        heads = tensor.view(-1, width, *tensor.shape[1:])
        return {name: heads[:, order].reshape(tensor.shape)}

    return Computed({name: shape}, function)
