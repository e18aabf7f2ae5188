"""A checkpoint in another dtype: what is not edited for another reason, and the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Transform
from bake.io.safetensors import torch_dtype

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def convert_others(
    checkpoint: Checkpoint, code: str, stored: Mapping[str, torch.Tensor]
) -> list[Transform]:
    """Rewrite every float tensor in another dtype, those of `stored` with what they will hold."""

    def convert(name: str) -> Transform:
        def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: stored.get(name, tensor).to(torch_dtype(code))}

        return Transform(name, {name: checkpoint.tensors[name].shape}, function, dtype=code)

    return [
        convert(name)
        for name, entry in checkpoint.tensors.items()
        if entry.dtype in FLOAT_DTYPES.values() and entry.dtype != code
    ]


def dtype_changes(checkpoint: Checkpoint, dtype: str | None) -> dict[str, Any]:
    """Return the config keys that state the weights' dtype, with another one; none where it is kept."""
    return dict.fromkeys(_dtype_keys(checkpoint.config), dtype) if dtype else {}


def _dtype_keys(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted paths of every key that states the weights' dtype, old spelling and new."""
    keys = []
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            keys.append(prefix + key)
        elif isinstance(value, Mapping):
            keys += _dtype_keys(value, f"{prefix}{key}.")
    return keys or ([] if prefix else ["dtype"])
