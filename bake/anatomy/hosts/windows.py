"""What several hosts ask of a config: does it slide, and do all its dimensions rotate?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Return what every decoder layer attends to: `sliding_attention` or `full_attention`.

    A window of at least `max_position_embeddings` tokens hides nothing and counts as none.
    """
    window = getattr(config, "sliding_window", None)
    layers = int(config.num_hidden_layers)
    if window is None or window >= config.max_position_embeddings:
        return [FULL] * layers
    stated = getattr(config, "layer_types", None)
    return list(stated) if stated else [SLIDING] * layers


def lost_window(config: PreTrainedConfig) -> str | None:
    """Say that a host without sliding windows would lose the config's; None where it has none."""
    if SLIDING not in layer_types(config):
        return None
    return f"it has no place for the sliding window of {config.sliding_window} tokens"


def rotary_share(config: PreTrainedConfig) -> float:
    """Return the share of a head's dimensions that rotate with the position."""
    parameters = config.rope_parameters
    return float(parameters.get("partial_rotary_factor", 1.0) if parameters else 1.0)


def lost_rotation(config: PreTrainedConfig) -> str | None:
    """Say that a host which rotates every dimension would rotate too many; None where it would not."""
    share = rotary_share(config)
    if share == 1.0:
        return None
    return f"it rotates every dimension of a head, and only {share:.0%} of them rotate here"
