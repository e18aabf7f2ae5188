"""The sizes of a model, from config.json alone: what a first look at a user's options is held against.

Neither torch nor transformers is imported, and of a model on the Hub only config.json is fetched. What
transformers makes of a config is for `bake.anatomy`; a size that stands under no usual key is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.checkpoint.checkpoint import find_config
from bake.io.shipped import find_model

HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
LAYER_COUNT = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Outline:
    """The width of the residual stream and the number of decoder layers; None for what is unknown."""

    hidden_size: int | None
    layer_count: int | None


def read_outline(model: str, revision: str | None = None) -> Outline:
    """Return a model's sizes. Raises CheckpointError where it has no config that can be read."""
    config = find_config(find_model(model), revision)
    return Outline(_size(config, HIDDEN_SIZE), _size(config, LAYER_COUNT))


def _size(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    values = [inner[key] for key in keys if key in inner]
    return values[0] if len(values) == 1 and type(values[0]) is int and values[0] > 0 else None
