"""Kinds of decoder layers: which layers of a model are alike, and which of them the twin needs.

Hybrids mix layers (full and linear attention, dense and sparse MLPs), and what is shown on one kind
says nothing of another. Two layers are of one kind when they have the same modules and parameters,
the same switches, and the same entries in the configuration's per-layer lists. Sizes don't count: a
twin's layer is then of the same kind as the real layers that it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.anatomy.tables import LAYER_COUNTS, LAYERS, SIZES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

LayerKind = Hashable
MOST_LAYERS = 16  # A twin with more would be no small model any more.


def find_layer_kinds(
    model: nn.Module, path: str, config: PreTrainedConfig
) -> tuple[LayerKind, ...]:
    """Return the kind of every decoder layer of a model (on the meta device will do).

    path: of the list of decoder layers.
    """
    layers: Any = model.get_submodule(path)
    entries = _per_layer_entries(config, len(layers))
    return tuple(
        frozenset(_parts(layer)) | {(name, values[index]) for name, values in entries.items()}
        for index, layer in enumerate(layers)
    )


def _parts(layer: nn.Module) -> list[tuple[str, Hashable]]:
    """Return a layer's modules, parameters and switches; numbers in names are left out of them."""
    found: list[tuple[str, Hashable]] = []
    for name, module in layer.named_modules():
        place = _without_numbers(name)
        found.append((place, type(module).__name__))
        for key, value in vars(module).items():
            if isinstance(value, bool) and not key.startswith("_") and key != "training":
                found.append((f"{place}.{key}", value))
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        found.append((_without_numbers(name), parameter.ndim))
    return found


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def _per_layer_entries(config: PreTrainedConfig, count: int) -> Mapping[str, Sequence[Hashable]]:
    """Return the lists of a config that have one plain entry a layer, sizes left out."""
    values = config.get_text_config(decoder=True).to_dict()
    fixed = find_fixed_lists(values, count)
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) == count
        and key not in SIZES
        and key not in fixed
        # Other whole numbers are indices of layers, of which there may be as many.
        and all(isinstance(entry, str | float | None) or entry in (0, 1) for entry in value)
    }


def find_fixed_lists(values: Mapping[str, Any], count: int) -> frozenset[str]:
    """Return the lists of a config that would be as long with another number of layers.

    values: the config's, with its model type. count: its layers. Falcon-H1 has five multipliers, whatever
    its depth, and five layers are no reason to cut them. What its class does not make by itself is taken
    for a list of layers.
    """
    from transformers import CONFIG_MAPPING

    key = next((name for name in LAYER_COUNTS if values.get(name)), None)
    if key is None or values.get("model_type") not in CONFIG_MAPPING:
        return frozenset()
    try:
        deeper = CONFIG_MAPPING[values["model_type"]](**{key: count + 1}).to_dict()
    except Exception:  # Whatever a third-party constructor raises, it tells nothing.
        return frozenset()
    return frozenset(
        name
        for name, value in deeper.items()
        if isinstance(value, list | tuple)
        and len(value) == count
        # Words are kinds of layers, one a layer, whatever a class has for a default (Reformer).
        and not any(isinstance(entry, str) for entry in value)
    )


def choose_layers_to_keep(kinds: Sequence[LayerKind]) -> list[list[int]]:
    """Return choices of real layers that a twin could be made of, the smallest first.

    Each choice is ascending and holds every kind: the first layer of every kind; the first layers as
    they are, for configurations that give their pattern as a period; and two layers of every kind,
    for architectures whose layers share weights.
    """
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    chosen = set(first.values())
    for index in range(len(kinds)):
        if len(chosen) >= min(LAYERS, len(kinds)):
            break
        chosen.add(index)
    start = max(*first.values(), min(LAYERS, len(kinds)) - 1) + 1
    twice = sorted(index for layers in layers_by_kind(kinds).values() for index in layers[:2])
    choices = [sorted(chosen), list(range(start)), twice]
    return [choice for choice in choices if len(choice) <= MOST_LAYERS]


@dataclass(frozen=True)
class LayerMap:
    """Which layers of the twin stand for which layers of the real model: those of the same kind."""

    real: tuple[LayerKind, ...]
    twin: tuple[LayerKind, ...]

    @property
    def kinds(self) -> list[LayerKind]:
        """The kinds that both have, the most frequent first."""
        return [kind for kind in layers_by_kind(self.real) if kind in self.twin]

    @property
    def strangers(self) -> list[int]:
        """The real layers that no layer of the twin is like."""
        return [index for index, kind in enumerate(self.real) if kind not in self.twin]

    def real_layers(self, kind: LayerKind) -> list[int]:
        """Return the real model's layers of a kind."""
        return [index for index, other in enumerate(self.real) if other == kind]

    def twin_layers(self, kind: LayerKind) -> list[int]:
        """Return the twin's layers of a kind."""
        return [index for index, other in enumerate(self.twin) if other == kind]

    def probed_layer(self, kind: LayerKind) -> int:
        """Return the twin's layer that is experimented on: the middle one of its kind."""
        layers = self.twin_layers(kind)
        return layers[len(layers) // 2]


def layers_by_kind(kinds: Sequence[LayerKind]) -> dict[LayerKind, list[int]]:
    """Return {kind: the layers that are of it}, the most frequent kind first."""
    found: dict[LayerKind, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
