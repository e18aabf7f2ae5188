"""Gemma 4 as host of those Gemma 4s that make no use of its per-layer inputs (12B, 31B, 26B-A4B).

A layer with per-layer inputs adds norm(P · (act(G·x) · input)) to the residual stream, behind everything
else. Here the inputs are constant and the rows of G come in pairs w and −w. GELU(a) + GELU(−a) is never
negative, and the columns of P are equal, so that what reaches the norm is a positive multiple of ones: the
norm returns ones times its weight, and its weight is the slot. Where none is pushed it is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.anatomy.hosts.conversion import Conversion, Shape, everywhere

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

WIDTH = 8  # of a layer's input: four rows w and as many −w
# The norm divides by the root of the mean square plus its epsilon, which has to be small beside it.
_LOUD = 64.0


def _refuse(config: PreTrainedConfig) -> str | None:
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "its per-layer inputs are in use"
    return None


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "hidden_size_per_layer_input": WIDTH,
        "vocab_size_per_layer_input": int(config.vocab_size),
    }


def _new(name: str, shape: Shape, config: PreTrainedConfig) -> torch.Tensor | None:
    """Return what a parameter holds so that every layer adds its last norm's weight, here zero."""
    import torch

    module = name.removesuffix(".weight").rpartition(".")[2]
    if module == "per_layer_input_gate":
        rows, columns = torch.arange(shape[0] // 2), torch.arange(shape[1])
        signs = 1.0 - 2.0 * (
            (columns[None, :] >> rows[:, None]) & 1
        )  # as a Hadamard matrix has them
        half = signs * shape[1] ** -0.5
        return torch.cat([half, -half])
    constant = {
        "embed_tokens_per_layer": 1.0,
        "per_layer_model_projection": 0.0,
        "per_layer_projection_norm": 1.0,
        "per_layer_projection": _LOUD,
        "post_per_layer_input_norm": 0.0,
    }.get(module)
    return None if constant is None else torch.tensor(constant).expand(shape)


def _remark(config: PreTrainedConfig) -> str:
    values = int(config.vocab_size) * int(config.num_hidden_layers) * WIDTH
    return f"per-layer inputs that it did not use become constant, {values / 1e6:.0f} million values more"


# Itself, and the text model of 12B, which has no place for per-layer inputs.
CONVERSIONS = tuple(
    Conversion(
        base,
        "gemma4_text",
        _refuse,
        _settings,
        slot=everywhere("post_per_layer_input_norm.weight"),
        new=_new,
        factor="layer_scalar",
        remark=_remark,
    )
    for base in ("gemma4_text", "gemma4_unified_text")
)
