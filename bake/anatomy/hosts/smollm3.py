"""SmolLM 3 as host: a Llama with sliding windows, layer by layer, and layers without rotary positions.

It takes what a Llama would lose: the window of Mistral, Ministral, Qwen 2 and Phi-3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import (
    HEAD_SIZE_KEY,
    SLIDING,
    layer_types,
    lost_rotation,
    stated_head_size,
)
from bake.anatomy.hosts.conversion import Conversion
from bake.anatomy.hosts.phi3 import LONG_CONTEXT_KEY, remark_on_long_context, split_fused

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuse(config: PreTrainedConfig) -> str | None:
    if SLIDING not in layer_types(config):
        return "without a sliding window it is no better than llama"
    return lost_rotation(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "no_rope_layers": [1]
        * int(config.num_hidden_layers),  # 1 says that the layer has positions
        **stated_head_size(config),
    }


def _with_attention_biases(config: PreTrainedConfig) -> dict[str, Any]:
    return {"attention_bias": True, **_settings(config)}


_READ = frozenset({HEAD_SIZE_KEY})

CONVERSIONS = (
    Conversion("qwen2", "smollm3", _refuse, _with_attention_biases),
    Conversion("mistral", "smollm3", _refuse, _settings, read=_READ),
    Conversion("ministral", "smollm3", _refuse, _settings, read=_READ),
    Conversion(
        "phi3",
        "smollm3",
        _refuse,
        _settings,
        split_fused,
        read=_READ | {LONG_CONTEXT_KEY},
        remark=remark_on_long_context,
    ),
)
