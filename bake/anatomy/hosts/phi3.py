"""Phi-3 as a base of several hosts: its fused matrices, and what its own code does beside computing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.anatomy.hosts.configs import head_size
from bake.anatomy.hosts.conversion import Computed, Shape, split_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LONG_CONTEXT_KEY = "original_max_position_embeddings"


def split_fused(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    """Cut fused matrices into the ones that they multiply: q, k, v and gate, up; keep others."""
    if ".qkv_proj." in name:
        width = head_size(config)
        heads = {
            "q": config.num_attention_heads,
            "k": config.num_key_value_heads,
            "v": config.num_key_value_heads,
        }
        return split_rows(
            {name.replace(".qkv_proj.", f".{p}_proj."): n * width for p, n in heads.items()}, shape
        )
    if ".gate_up_proj." in name:
        return split_rows(
            {
                name.replace(".gate_up_proj.", f".{part}_proj."): config.intermediate_size
                for part in ("gate", "up")
            },
            shape,
        )
    return name


def remark_on_long_context(config: PreTrainedConfig) -> str:
    """Say what is not re-expressed, where a config has two sets of frequencies."""
    if not config.rope_parameters or config.rope_parameters.get("rope_type") != "longrope":
        return ""
    return (
        f"generation that crosses {config.original_max_position_embeddings} tokens keeps its cache, "
        f"which Phi-3's own code computes anew there"
    )
