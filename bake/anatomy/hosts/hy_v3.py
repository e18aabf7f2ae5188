"""Hunyuan 3 as host: a mixture of experts of which only dense layers are used, each of them a Qwen 3's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import lost_rotation, lost_window
from bake.anatomy.hosts.re_express import Conversion

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _refuse(config: PreTrainedConfig) -> str | None:
    return lost_window(config) or lost_rotation(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": True, "mlp_layer_types": ["dense"] * int(config.num_hidden_layers)}


CONVERSIONS = (Conversion("qwen3", "hy_v3", _refuse, _settings),)
