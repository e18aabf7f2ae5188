"""Aria's text model as host: experts as Mixtral's, and shared ones of which only the bias is used.

Mixtral keeps every expert's matrices apart, Aria keeps a layer's together and transposed, so they are
merged; no bit of a value changes. The shared experts have width 0: they compute nothing and add their bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.configs import lost_rotation, lost_window, stated_head_size
from bake.anatomy.hosts.conversion import Computed, Conversion, Merged, Shape, everywhere

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def _convert(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    return name.replace(".block_sparse_moe.gate.", ".mlp.router.")


def _merge(shapes: Mapping[str, Shape], config: PreTrainedConfig) -> Iterator[Merged]:
    """Yield each layer's gate and up projections, and its down projections, of all experts together.

    Layers that lack an expert are left as they are: they will be found to lack something.
    """
    hidden, width, experts = (
        config.hidden_size,
        config.intermediate_size,
        config.num_local_experts,
    )
    for layer in range(config.num_hidden_layers):
        place = f"model.layers.{layer}.block_sparse_moe.experts"
        target = f"model.layers.{layer}.mlp.experts"
        pairs = tuple(f"{place}.{e}.{part}.weight" for e in range(experts) for part in ("w1", "w3"))
        downs = tuple(f"{place}.{e}.w2.weight" for e in range(experts))
        if not all(name in shapes for name in (*pairs, *downs)):
            continue
        yield _stack(pairs, f"{target}.gate_up_proj", (experts, hidden, 2 * width))
        yield _stack(downs, f"{target}.down_proj", (experts, width, hidden))


def _stack(sources: tuple[str, ...], target: str, shape: Shape) -> Merged:
    """Lay the rows of each expert's matrices under each other, and transpose every expert."""

    def function(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        experts, columns, rows = shape
        together = torch.cat([tensors[name] for name in sources])
        return {target: together.view(experts, rows, columns).transpose(1, 2).contiguous()}

    return Merged(sources, {target: shape}, function)


def _refuse(config: PreTrainedConfig) -> str | None:
    if config.hidden_act != "silu":
        return f"its experts compute silu, and the base's {config.hidden_act}"
    return lost_window(config) or lost_rotation(config)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "mlp_bias": True,
        "moe_num_experts": config.num_local_experts,
        "moe_topk": config.num_experts_per_tok,
        "moe_num_shared_experts": 0,
        **stated_head_size(config),
    }


CONVERSIONS = (
    Conversion(
        "mixtral",
        "aria_text",
        _refuse,
        _settings,
        _convert,
        everywhere("mlp.shared_experts.down_proj.bias"),
        remark=lambda config: "torch remarks on loading that it does not initialise empty matrices",
        merge=_merge,
        on_disk={
            ".mlp.experts.gate_up_proj": ".mlp.experts.fc1.weight",
            ".mlp.experts.down_proj": ".mlp.experts.fc2.weight",
        },
    ),
)
