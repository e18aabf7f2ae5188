"""Shrink a configuration: the same architecture and feature set, small enough to build in milliseconds.

Sizes become small; everything that decides *what* is computed (tying, activation, rope type, norms,
flags, multipliers, expert routing, the pattern of layer kinds) is kept. How configurations name their
sizes is data, in `bake.anatomy.tables`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.anatomy.layers import find_fixed_lists
from bake.anatomy.tables import (
    CHOICES,
    HEAD_SIZE,
    HEADS,
    KEY_VALUE_HEADS,
    LAYER_COUNTS,
    LAYER_INDICES,
    LAYERS,
    PREFIX_COUNTS,
    ROTARY_FACTORS,
    ROTARY_PARTS,
    SIZES,
    SUFFIX_COUNTS,
    TOKENS,
    TWINS,
)
from bake.anatomy.wrappers import text_key

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def shrink(config: PreTrainedConfig, keep: Sequence[int] = range(LAYERS)) -> PreTrainedConfig:
    """Return a small config of the same class; the one given is left alone.

    keep: the decoder layers of the real model that the twin's layers are to be like, ascending.
    """
    # An older checkpoint's JSON may carry keys that the class drops, so go through its own dict.
    values = copy.deepcopy(config.to_dict())
    small = _Shrinking(values, keep, text_key(config)).values()
    return type(config)(**small, **_beyond_init(config, small))


def _beyond_init(config: PreTrainedConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config's `to_dict` leaves out and its architecture asks for."""
    return {
        key: getattr(config, key)
        for key in ("is_decoder", "is_encoder_decoder")
        if key not in values and getattr(config, key, None)
    }


@dataclass(frozen=True)
class _Shrinking:
    """The values of one config (the outer one or a nested one) on their way to a twin's."""

    given: Mapping[str, Any]
    keep: Sequence[int]
    text_key: str | None = None

    def values(self) -> dict[str, Any]:
        small = {key: self._small(key, value) for key, value in self.given.items()}
        small.update(self.own_sizes)
        for key in (
            "model_type",
            "transformers_version",
            "architectures",
            "dtype",
            "_name_or_path",
        ):
            small.pop(key, None)
        return small

    @property
    def own_sizes(self) -> Mapping[str, Any]:
        """What this model type's twin needs beyond the size names."""
        return TWINS.get(self.given.get("model_type", ""), {})

    @property
    def layers(self) -> int | None:
        """How many decoder layers the real model has."""
        return next((self.given[k] for k in LAYER_COUNTS if self.given.get(k)), None)

    @cached_property
    def fixed_lists(self) -> Collection[str]:
        """Lists that have as many entries as there are layers by chance."""
        return find_fixed_lists(self.given, self.layers or 0)

    @property
    def heads(self) -> int | None:
        return next(
            (
                self.given[k]
                for k in ("num_attention_heads", "n_head", "n_heads")
                if k in self.given
            ),
            None,
        )

    def _small(self, key: str, value: Any) -> Any:
        if key in self.own_sizes:
            return self.own_sizes[key]
        if isinstance(value, bool) or value is None:
            return value
        if key in TOKENS:
            return TOKENS[key]
        if isinstance(value, dict):
            return self._small_dict(key, value)
        if isinstance(value, list | tuple):
            return self._small_list(key, list(value))
        if key in ROTARY_PARTS:
            return value and max(1, round(value * HEAD_SIZE / 2)) * 2 / HEAD_SIZE
        if isinstance(value, float):
            return 0.0 if key.endswith(("dropout", "_pdrop", "dropout_prob")) else value
        return self._small_size(key, value) if isinstance(value, int) else value

    def _small_size(self, key: str, value: int) -> int:
        if key == "sliding_window" and value >= (
            self.given.get("max_position_embeddings") or value + 1
        ):
            return value  # It hides nothing, and must not begin to.
        if key in LAYER_COUNTS:
            return len(self.keep)
        if key in KEY_VALUE_HEADS:
            return HEADS if value == self.heads else (1 if value == 1 else HEADS // 2)
        if key in CHOICES:
            return min(value, 2)
        if key in PREFIX_COUNTS:
            return sum(layer < value for layer in self.keep)
        if key in SUFFIX_COUNTS:
            return sum(layer >= (self.layers or 0) - value for layer in self.keep)
        return SIZES.get(key, value) if value else 0

    def _small_list(self, key: str, value: list[Any]) -> list[Any]:
        if key in LAYER_INDICES:
            return [index for index, layer in enumerate(self.keep) if layer in value]
        if key in ROTARY_FACTORS:
            return value[: max(1, len(value) * HEAD_SIZE // self._head_size())]
        if len(value) == self.layers and key not in self.fixed_lists:
            value = [value[layer] for layer in self.keep]
        return [self._small(key, entry) for entry in value]

    def _small_dict(self, key: str, value: dict[Any, Any]) -> dict[Any, Any]:
        if "model_type" in value:
            # A nested config (a wrapper's text or vision tower) keeps its type.
            keep = self.keep if key == self.text_key else range(2)
            nested = _Shrinking(value, keep).values()
            return {**nested, "model_type": value["model_type"]}
        if value and all(str(k).isdigit() and isinstance(v, dict) for k, v in value.items()):
            # Settings of single layers, by their index.
            by_layer = {int(layer): entry for layer, entry in value.items()}
            return {
                index: self._small_settings(by_layer[layer])
                for index, layer in enumerate(self.keep)
                if layer in by_layer
            }
        return self._small_settings(value)

    def _small_settings(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        """Shrink settings that hold in place of this config's own, where they name the same."""
        inner = _Shrinking({**self.given, **values}, self.keep)
        return {name: inner._small(name, entry) for name, entry in values.items()}

    def _head_size(self) -> int:
        given = self.given.get("head_dim")
        return int(given or self.given["hidden_size"] // (self.heads or 1))
