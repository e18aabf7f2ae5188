"""Shrink a configuration: the same architecture and feature set, small enough to build in milliseconds.

Sizes become small; everything that decides *what* is computed (tying, activation, rope type, norms,
flags, multipliers, expert routing) is kept. Configurations name the same size in many ways; the
table lists those names, not architectures.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAYERS, HIDDEN, HEADS, HEAD_SIZE, FEED_FORWARD, VOCABULARY = 3, 32, 4, 8, 80, 96

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    "head_dim": HEAD_SIZE,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), FEED_FORWARD),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    "vocab_size": VOCABULARY,
    "sliding_window": 6,
}
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a small config of the same class; the one given is left alone."""
    # An older checkpoint's JSON may carry keys that the class drops, so go through its own dict.
    return type(config)(**_shrink_values(copy.deepcopy(config.to_dict())))


def _shrink_values(values: dict[str, Any]) -> dict[str, Any]:
    heads = next((values[k] for k in ("num_attention_heads", "n_head") if values.get(k)), None)
    layers = next((values[k] for k in _SIZES if _SIZES[k] == LAYERS and values.get(k)), None)
    small = {key: _small(key, value, heads) for key, value in values.items()}
    window, reach = values.get("sliding_window"), values.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(reach, int) and window >= reach:
        small["sliding_window"] = window  # It hides nothing, and must not begin to.
    for key, value in small.items():
        if key == "rope_parameters" and isinstance(value, dict):
            small[key] = _shrink_rotations(value)
        elif isinstance(value, dict) and "model_type" in value:
            # A nested config (a wrapper's text or vision tower) keeps its type.
            small[key] = {**_shrink_values(value), "model_type": value["model_type"]}
        elif isinstance(value, list) and layers and len(value) == layers:
            small[key] = value[:LAYERS]
        elif key.endswith(("dropout", "_pdrop")) and isinstance(value, float):
            small[key] = 0.0
    for key in ("model_type", "transformers_version", "architectures", "dtype", "_name_or_path"):
        small.pop(key, None)
    return small


def _shrink_rotations(parameters: dict[str, Any]) -> dict[str, Any]:
    """Cut lists of one factor a frequency (longrope's) to the frequencies of a small head."""
    count = int(HEAD_SIZE * float(parameters.get("partial_rotary_factor") or 1.0)) // 2
    return {
        key: value[:count] if key in ("short_factor", "long_factor") else value
        for key, value in parameters.items()
    }


def _small(key: str, value: Any, heads: int | None) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if key in _TOKENS:
        return _TOKENS[key]
    if key in _KEY_VALUE_HEADS and isinstance(value, int):
        return HEADS if value == heads else (1 if value == 1 else HEADS // 2)
    if key in _SIZES and isinstance(value, int):
        return _SIZES[key]
    return value
