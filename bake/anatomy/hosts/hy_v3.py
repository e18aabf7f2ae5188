"""Hunyuan 3 as host: a mixture of experts with normalised queries and keys.

Its dense layers are a Qwen 3's. Its sparse ones are dots.llm1's and GLM-4.5's: a sigmoid router with a
correction, weights that are normalised and scaled, and a shared expert that every token goes through,
whose bias takes the push.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import HEAD_SIZE_KEY, head_size, lost_rotation, lost_window
from bake.anatomy.hosts.conversion import Computed, Conversion, Shape
from bake.anatomy.hosts.rotary import (
    full_rotation,
    lost_scaling,
    order_for_full_rotation,
    reorder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PARTS = ("gate_proj", "up_proj", "down_proj")


def _refuse(config: PreTrainedConfig) -> str | None:
    return lost_window(config) or lost_rotation(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": True, "mlp_layer_types": ["dense"] * int(config.num_hidden_layers)}


def _refuse_router(config: PreTrainedConfig) -> str | None:
    if config.n_group != 1 and config.n_group != config.topk_group:
        groups = f"{config.topk_group} of {config.n_group} groups"
        return f"it chooses among all experts, and the base among {groups}"
    if not config.norm_topk_prob:
        return "it normalises the weights of the chosen experts, and the base does not"
    if not config.n_shared_experts:
        return "it has a shared expert, and the base has none"
    return None


def _refuse_dots(config: PreTrainedConfig) -> str | None:
    return _refuse(config) or _refuse_router(config)


def _refuse_glm(config: PreTrainedConfig) -> str | None:
    if not config.use_qk_norm:
        return "it normalises queries and keys, and the base does not"
    return lost_scaling(config) or _refuse_router(config)


def _sparse_settings(config: PreTrainedConfig) -> dict[str, Any]:
    dense = min(int(config.first_k_dense_replace or 0), int(config.num_hidden_layers))
    sparse = int(config.num_hidden_layers) - dense
    return {
        "mlp_bias": True,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * sparse,
        "num_experts": config.n_routed_experts,
        "num_shared_experts": config.n_shared_experts,
        "router_scaling_factor": float(config.routed_scaling_factor),
        "enable_moe_fp32_combine": False,
        HEAD_SIZE_KEY: head_size(config),
    }


def _glm_settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_sparse_settings(config), **full_rotation(config)}


def _slot(config: PreTrainedConfig, layer: int) -> str:
    dense = layer < int(config.first_k_dense_replace or 0)
    return "mlp.down_proj.bias" if dense else "mlp.shared_experts.down_proj.bias"


def _convert(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    return name.replace(".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias")


def _convert_glm(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    if any(part in name for part in (".q_proj.", ".k_proj.", ".q_norm.", ".k_norm.")):
        order = order_for_full_rotation(config, neighbours=False)
        return reorder(name, shape, head_size(config), order)
    return _convert(name, shape, config)


def _fuse_experts(
    shapes: Mapping[str, Shape], config: PreTrainedConfig
) -> Iterator[tuple[str, Shape, str]]:
    """Yield what transformers merges of a layer's experts, which both store one by one."""
    experts = int(config.n_routed_experts)
    for layer in range(int(config.num_hidden_layers)):
        place = f"model.layers.{layer}.mlp.experts"
        names = {part: [f"{place}.{e}.{part}.weight" for e in range(experts)] for part in _PARTS}
        if not all(name in shapes for pieces in names.values() for name in pieces):
            continue  # A dense layer, or one that is found to lack something.
        gate, _, down = (names[part][0] for part in _PARTS)
        width, hidden = shapes[gate]
        yield f"{place}.gate_up_proj", (experts, 2 * width, hidden), gate
        yield f"{place}.down_proj", (experts, *shapes[down]), down


# As the host's own checkpoints have it; transformers reads these names and others.
_ON_DISK = {
    ".mlp.gate.weight": ".mlp.router.gate.weight",
    ".mlp.e_score_correction_bias": ".mlp.expert_bias",
    ".mlp.shared_experts.": ".mlp.shared_mlp.",
}

CONVERSIONS = (
    Conversion("qwen3", "hy_v3", _refuse, _settings),
    Conversion(
        "dots1",
        "hy_v3",
        _refuse_dots,
        _sparse_settings,
        _convert,
        _slot,
        fused=_fuse_experts,
        on_disk=_ON_DISK,
    ),
    Conversion(
        "glm4_moe",
        "hy_v3",
        _refuse_glm,
        _glm_settings,
        _convert_glm,
        _slot,
        read=frozenset({HEAD_SIZE_KEY}),
        fused=_fuse_experts,
        on_disk=_ON_DISK,
    ),
)
