"""Llama as host: the one that most engines run, and nearly everything is a Llama but for its biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import lost_rotation, lost_window
from bake.anatomy.hosts.phi3 import LONG_CONTEXT_KEY, remark_on_long_context, split_fused
from bake.anatomy.hosts.re_express import Conversion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuse(config: PreTrainedConfig) -> str | None:
    return lost_window(config) or lost_rotation(config)


def _with_attention_biases(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": True, "mlp_bias": True}


def _with_mlp_biases(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": True}


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
)
