"""Bamba as host: of its two kinds of layer only attention, which can rotate a part of a head.

It takes what a Llama would rotate too far: Phi-3 with partial rotary positions (Phi-4-mini) and GLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import (
    HEAD_SIZE_KEY,
    head_size,
    lost_rotation,
    lost_window,
    stated_head_size,
)
from bake.anatomy.hosts.conversion import Computed, Conversion, Shape, everywhere
from bake.anatomy.hosts.phi3 import LONG_CONTEXT_KEY, remark_on_long_context, split_fused
from bake.anatomy.hosts.rotary import reorder, rotated_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NAMES = {
    ".mlp.": ".feed_forward.",
    ".post_attention_layernorm.": ".pre_ff_layernorm.",
    "model.norm.": "model.final_layernorm.",
}


def _rename(name: str) -> str:
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def _convert_phi3(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    return split_fused(_rename(name), shape, config)


def _convert_glm(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    if ".q_proj." in name or ".k_proj." in name:
        return _order_rotations(name, shape, config)
    return split_fused(_rename(name), shape, config)


def _order_rotations(name: str, shape: Shape, config: PreTrainedConfig) -> Computed:
    """Reorder rows: GLM rotates neighbours (0, 1), (2, 3), …, Bamba the halves (0, r/2), (1, r/2 + 1), …"""
    width, rotated = head_size(config), rotated_size(config)
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, width)]
    return reorder(name, shape, width, order)


def _refuse(config: PreTrainedConfig) -> str | None:
    if lost_rotation(config) is None:
        return "where every dimension rotates it is no better than llama"
    return lost_window(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "mlp_bias": True,
        "attn_layer_indices": list(range(int(config.num_hidden_layers))),
        "mamba_n_heads": 1,  # No layer has one, and the default need not divide the width.
        **stated_head_size(config),
    }


_SLOT = everywhere("feed_forward.down_proj.bias")

CONVERSIONS = (
    Conversion(
        "phi3",
        "bamba",
        _refuse,
        _settings,
        _convert_phi3,
        _SLOT,
        read=frozenset({HEAD_SIZE_KEY, LONG_CONTEXT_KEY}),
        remark=remark_on_long_context,
    ),
    Conversion(
        "glm", "bamba", lost_window, _settings, _convert_glm, _SLOT, read=frozenset({HEAD_SIZE_KEY})
    ),
)
