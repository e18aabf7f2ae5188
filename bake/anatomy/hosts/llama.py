"""Llama as host: the one that most engines run, and nearly everything is a Llama but for its biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import (
    HEAD_SIZE_KEY,
    head_size,
    lost_rotation,
    lost_window,
    stated_head_size,
)
from bake.anatomy.hosts.conversion import Computed, Conversion, Shape
from bake.anatomy.hosts.phi3 import LONG_CONTEXT_KEY, remark_on_long_context, split_fused
from bake.anatomy.hosts.rotary import (
    full_rotation,
    lost_scaling,
    order_for_full_rotation,
    reorder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuse(config: PreTrainedConfig) -> str | None:
    return lost_window(config) or lost_rotation(config)


def _with_attention_biases(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": True, "mlp_bias": True}


def _with_mlp_biases(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": True}


def _refuse_glm(config: PreTrainedConfig) -> str | None:
    return lost_window(config) or lost_scaling(config)


def _with_full_rotation(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": True, **full_rotation(config), **stated_head_size(config)}


def _convert_glm(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    if ".q_proj." in name or ".k_proj." in name:
        order = order_for_full_rotation(config, neighbours=True)
        return reorder(name, shape, head_size(config), order)
    return split_fused(name, shape, config)


def _llama_4_scaling(config: PreTrainedConfig) -> float:
    return float((config.rope_parameters or {}).get("llama_4_scaling_beta") or 0.0)


def _without_llama_4_scaling(config: PreTrainedConfig) -> dict[str, Any]:
    dropped = ("llama_4_scaling_beta", "max_position_embeddings")
    rotation = {k: v for k, v in config.rope_parameters.items() if k not in dropped}
    return {"mlp_bias": True, "rope_parameters": rotation, **stated_head_size(config)}


def _limit_of_llama_4_scaling(config: PreTrainedConfig) -> str:
    """Say from which position on the queries of the base grow, and a Llama's do not."""
    context = int((config.rope_parameters or {}).get("original_max_position_embeddings") or 0)
    if not _llama_4_scaling(config) or config.max_position_embeddings <= context:
        return ""
    return (
        f"exact within the first {context} of {config.max_position_embeddings} tokens only, because a "
        f"Llama lacks what scales queries beyond (llama_4_scaling_beta)"
    )


CONVERSIONS = (
    # Qwen 2 has biases on q, k and v alone; Llama's flag gives o one too, which stays zero.
    Conversion("qwen2", "llama", _refuse, _with_attention_biases),
    Conversion("mistral", "llama", _refuse, _with_mlp_biases),
    Conversion("ministral", "llama", _refuse, _with_mlp_biases),
    Conversion(
        "phi3",
        "llama",
        _refuse,
        _with_mlp_biases,
        split_fused,
        read=frozenset({LONG_CONTEXT_KEY}),
        remark=remark_on_long_context,
    ),
    Conversion(
        "glm",
        "llama",
        _refuse_glm,
        _with_full_rotation,
        _convert_glm,
        read=frozenset({HEAD_SIZE_KEY}),
    ),
    Conversion(
        "ministral3",
        "llama",
        _refuse,
        _without_llama_4_scaling,
        read=frozenset({HEAD_SIZE_KEY}),
        limit=_limit_of_llama_4_scaling,
    ),
)
