"""Llama as host: the one that most engines run, and nearly everything is a Llama but for its biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.conversion import Computed, Conversion, Shape, split_rows
from bake.anatomy.hosts.windows import lost_rotation, lost_window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def head_size(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def split_fused(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    """Cut Phi-3's fused matrices into the ones that it multiplies: q, k, v and gate, up."""
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
    """Say what Phi-3's own code does beside computing, where a config has two sets of frequencies."""
    if not config.rope_parameters or config.rope_parameters.get("rope_type") != "longrope":
        return ""
    return (
        f"generation that crosses {config.original_max_position_embeddings} tokens keeps its cache, "
        f"which Phi-3's own code computes anew there"
    )


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
        read=frozenset({"original_max_position_embeddings"}),
        remark=remark_on_long_context,
    ),
)
