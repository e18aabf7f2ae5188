"""Granite as host: a Llama with multipliers, one of which is Gemma's scale on the embeddings.

Gemma's norms multiply by 1 + w and Granite's by w, so 1 + w has to be stored. Gemma computes it in
float32; bfloat16 has no room for it beside a small w, so there the conversion rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import HEAD_SIZE_KEY, head_size, stated_head_size
from bake.anatomy.hosts.conversion import Computed, Conversion, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _convert(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    if not name.endswith("norm.weight"):
        return name
    return Computed({name: shape}, lambda tensor: {name: tensor + 1})


def _refuse(config: PreTrainedConfig) -> str | None:
    if getattr(config, "use_bidirectional_attention", None):
        return "it attends backwards only, and this base both ways"
    return None


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "mlp_bias": True,
        "hidden_act": config.hidden_act,  # Engines may take a Granite's to be SiLU.
        "embedding_multiplier": float(config.hidden_size) ** 0.5,
        "attention_multiplier": float(head_size(config)) ** -0.5,
        **stated_head_size(config),
    }


CONVERSIONS = (
    Conversion(
        "gemma",
        "granite",
        _refuse,
        _settings,
        _convert,
        read=frozenset({HEAD_SIZE_KEY}),
        lossless=False,
        remark=lambda config: "norms hold 1 + w, which only float32 holds exactly: --dtype float32",
    ),
)
