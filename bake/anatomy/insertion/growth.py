"""Growth: a configuration with more decoder layers, in which every old layer stays what it was.

What a configuration says of single layers comes as a list with one entry a layer, as a list of
indices, or as a count of layers from the first on. All three grow; a pattern that the architecture
computes from the layer's number (every fourth layer is another) cannot. Whether it worked is not
argued from names: the grown model is built on the meta device and compared with the old, layer by layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from bake.anatomy.flags import with_flags
from bake.anatomy.insertion.filling import Filling, layer_kind
from bake.anatomy.wrappers import text_key
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.pretrained import load_config
from bake.errors import UnsupportedError
from bake.io.work_directory import temporary_directory

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

_OVERRIDES = "per_layer_config"  # {a layer's number, as text: keys that it has otherwise}
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "n_block")
# How many layers, from the first on, are of another kind than the rest.
_PREFIX_COUNTS = (
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "max_window_layers",
)
# How many layers, up to the last, are of another kind than the rest.
_SUFFIX_COUNTS = ("num_kv_shared_layers",)
# Lists of layers' indices; others are recognised by their form.
_INDICES = re.compile(r"(layers|idxs?|indices|layer_ids)$")
_NOT_OF_LAYERS = re.compile(r"token|architectures|section|(?<!intermediate_)sizes?$")
_NUMBER_OF_THE_LAYER = re.compile(r"idx|index|layer_id|layer_number|depth")


@dataclass(frozen=True)
class Place:
    """A layer of the grown model: the base's layer `source`, or a new one of the same kind."""

    source: int
    inserted: bool = False


@dataclass(frozen=True)
class Growth:
    """A grown model: its layers, the changes to config.json, and itself on the meta device."""

    places: tuple[Place, ...]
    changes: Mapping[str, Any]
    model: nn.Module


def plan_growth(
    config: PreTrainedConfig,
    config_text: str,
    path: str,
    filling: Filling,
    layers: Sequence[int],
) -> Growth:
    """Decide what layers are put in and what the config says then.

    config: the base's. config_text: its config.json. path: of the list of decoder layers. An
    inserted layer is the cheapest that can be filled, where the config has a place for its kind, or
    else of the kind of the layer before it. Raises UnsupportedError where old layers would not stay
    what they are.
    """
    values = json.loads(config_text)
    flagged = with_flags(config, dict(filling.flags))
    before = build_on_meta(flagged)
    old: Any = before.get_submodule(path)
    refusal = UnsupportedError(
        f"{config.model_type}: none of its layers is of a kind on which an inserted layer was proven"
    )
    for donors in _choose_donors(old, filling, layers):
        places = arrange(len(old), donors)
        changes = {**dict(filling.flags), **grow_config(flagged, places, values)}
        changes = {_as_spelled(key, values): value for key, value in changes.items()}
        try:
            after = _build(edit_json(config_text, changes))
            check_growth(before, after, path, places, config.model_type)
        except UnsupportedError as error:
            refusal = error
        except (StrictDataclassError, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            refusal = UnsupportedError(
                f"{config.model_type}: no config with more layers ({reason})"
            )
        else:
            return Growth(places, changes, after)
    raise refusal


def _choose_donors(old: Any, filling: Filling, layers: Sequence[int]) -> Iterator[dict[int, int]]:
    """Yield choices of {pushed layer: the layer whose kind is put after it}, the best first."""
    fit = {
        index: sum(parameter.numel() for parameter in layer.parameters())
        for index, layer in enumerate(old)
        if layer_kind(layer) in filling.kinds
    }
    if not fit:
        return
    nearest = {layer: min(fit, key=lambda index: (abs(index - layer), index)) for layer in layers}
    cheapest = {
        layer: min(fit, key=lambda index: (fit[index], abs(index - layer), index))
        for layer in layers
    }
    following = {
        layer: min(fit, key=lambda index: (abs(index - layer - 1), -index)) for layer in layers
    }
    tried: list[dict[int, int]] = []
    for donors in (cheapest, nearest, following):
        if donors not in tried:
            tried.append(donors)
            yield donors


def config_from_text(config_text: str) -> PreTrainedConfig:
    """Return the config that a config.json describes, as transformers reads it."""
    with temporary_directory("bake-twin-") as directory:
        (directory / "config.json").write_text(config_text, encoding="utf-8")
        return load_config(directory)


def _build(config_text: str) -> nn.Module:
    """Build the model that a config.json describes, on the meta device."""
    return build_on_meta(config_from_text(config_text))


def _as_spelled(key: str, values: Mapping[str, Any]) -> str:
    """Return a key as config.json has it: a wrapper's decoder may be saved on its own, unnested."""
    parent, _, inside = key.partition(".")
    return inside if inside and parent not in values else key


def arrange(count: int, donors: Mapping[int, int]) -> tuple[Place, ...]:
    """Return the layers of the grown model. donors: {layer: of which kind the one put after it is}."""
    places: list[Place] = []
    for layer in range(count):
        places.append(Place(layer))
        if layer in donors:
            places.append(Place(donors[layer], inserted=True))
    return tuple(places)


def grow_config(
    config: PreTrainedConfig,
    places: Sequence[Place],
    values: Mapping[str, Any],
    count: int | None = None,
) -> dict[str, Any]:
    """Return the config keys that have to change, {dotted key: value}.

    values: what config.json says. count: how many layers the config has, where not all of them are among
    the places.
    """
    text = config.get_text_config(decoder=True)
    prefix = _nesting(config, text)
    count = sum(not place.inserted for place in places) if count is None else count
    changes: dict[str, Any] = {}
    for key, value in vars(text).items():
        grown = _grow(key, value, count, places)
        if grown is not None and grown != value:
            changes[prefix + key] = grown
    said: Any = values.get(prefix.removesuffix("."), values) if prefix else values
    if isinstance(said, Mapping) and isinstance(said.get(_OVERRIDES), Mapping):
        changes[prefix + _OVERRIDES] = _grow_overrides(said[_OVERRIDES], places)
    return changes


def _grow_overrides(overrides: Mapping[str, Any], places: Sequence[Place]) -> dict[str, Any]:
    """Return what single layers have otherwise than the rest, {number as wide as the last: keys}."""
    by_layer = {int(layer): keys for layer, keys in overrides.items()}
    width = len(str(len(places) - 1))
    return {
        f"{index:0{width}}": by_layer[place.source]
        for index, place in enumerate(places)
        if place.source in by_layer
    }


def _grow(key: str, value: Any, count: int, places: Sequence[Place]) -> Any:
    """Return a key's value in the grown config; None where the key says nothing of single layers."""
    if key.startswith("_") or isinstance(value, bool):
        return None
    if key in _COUNTS and value == count:
        return len(places)
    if key in _PREFIX_COUNTS and isinstance(value, int):
        return sum(place.source < value for place in places) if value <= count else None
    if key in _SUFFIX_COUNTS and isinstance(value, int):
        return sum(place.source >= count - value for place in places)
    if isinstance(value, list | tuple) and value and not _NOT_OF_LAYERS.search(key):
        if _are_indices(key, value, count):
            return [index for index, place in enumerate(places) if place.source in value]
        if len(value) == count:
            return [value[place.source] for place in places]
    return None


def _are_indices(key: str, value: Sequence[Any], count: int) -> bool:
    """Tell a list of layers' numbers, [3, 7, 11], from one with an entry a layer, [1, 1, 1, 0]."""
    if not _INDICES.search(key):
        return False
    numbers = all(type(entry) is int and 0 <= entry < count for entry in value)
    return numbers and list(value) == sorted(set(value))


def _nesting(config: PreTrainedConfig, text: PreTrainedConfig) -> str:
    """Return the prefix of the keys of the config that describes the decoder."""
    if text is config:
        return ""
    key = text_key(config)
    if key is None:
        raise UnsupportedError(
            f"{config.model_type}: config.json has no place of its own for the text decoder's keys"
        )
    return f"{key}."


def check_growth(
    before: nn.Module, after: nn.Module, path: str, places: Sequence[Place], model_type: str
) -> None:
    """Raise UnsupportedError where a layer of the grown model is not what its source is.

    An inserted layer may be like any other of the base that has its source's parameters: where the last
    layer of a kind has a duty (Gemma 4's keeps keys and values for those that share them), one that is put
    before it has none. before, after: on the meta device; path: of the list of decoder layers.
    """
    old: Any = before.get_submodule(path)
    new: Any = after.get_submodule(path)
    if len(new) != len(places):
        raise UnsupportedError(
            f"{model_type}: the grown config makes {len(new)} layers where {len(places)} were wanted"
        )
    facts = [_facts(layer, index) for index, layer in enumerate(old)]
    for index, place in enumerate(places):
        found, wanted = _facts(new[index], index), facts[place.source]
        if place.inserted and any(
            found == other and layer_kind(layer) == layer_kind(old[place.source])
            for layer, other in zip(old, facts, strict=True)
        ):
            continue
        if found != wanted:
            differing = sorted(
                name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
            )
            raise UnsupportedError(
                f"{model_type}: what a layer is follows from its number ({differing[0]} of layer "
                f"{place.source} would change at place {index}), so no layer can be put in between"
            )


def _facts(layer: nn.Module, index: int) -> dict[str, Any]:
    """Return everything that tells one layer from another, its own number left out."""
    facts: dict[str, Any] = {
        name: tuple(tensor.shape) for name, tensor in layer.state_dict(keep_vars=True).items()
    }
    for name, module in layer.named_modules():
        facts[f"{name}:"] = type(module).__name__
        for key, value in vars(module).items():
            if key.startswith("_") or not isinstance(value, bool | int | float | str | None):
                continue
            # A layer with two attentions counts them in this number; it is where the cache keeps them.
            counted = key == "layer_idx" or (value == index and _NUMBER_OF_THE_LAYER.search(key))
            numbered = type(value) is int and counted
            facts[f"{name}.{key}"] = "its number" if numbered else value
    return facts
