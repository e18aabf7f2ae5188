"""What several hosts ask of a config: does it slide, do all its dimensions rotate, how wide is a head?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HEAD_SIZE_KEY = "head_dim"
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


def remark_on_window(config: PreTrainedConfig) -> str:
    """Say that a window is left out because it is as wide as the context; "" where none is."""
    window = getattr(config, "sliding_window", None)
    if window is None or window < config.max_position_embeddings:
        return ""
    return (
        f"its window of {window} tokens hides nothing within the context of "
        f"{config.max_position_embeddings} and is left out"
    )


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


def head_size(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    stated = getattr(config, HEAD_SIZE_KEY, None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def stated_head_size(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the key for hosts that read it though their class does not list it; null would break them."""
    return {HEAD_SIZE_KEY: head_size(config)}
