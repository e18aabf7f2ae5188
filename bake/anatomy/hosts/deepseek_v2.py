"""DeepSeek-V2 as host: latent attention and a mixture of experts of which only dense layers are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.conversion import Conversion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuse(config: PreTrainedConfig) -> str | None:
    if not config.rope_interleave:
        return "it rotates neighbouring dimensions of a head, and the base its halves"
    return None


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": True, "first_k_dense_replace": int(config.num_hidden_layers)}


CONVERSIONS = (Conversion("youtu", "deepseek_v2", _refuse, _settings),)
