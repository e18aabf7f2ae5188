"""What a file says beside its vectors: what they are for, where they belong, which layers they are of.

bake adds a direction to an activation, and nothing else. A file whose metadata declare a projection, an
ablation, a clamp, a scaling, or a place that is none of bake's sites, is refused by the name of the field:
added, its vectors would do the opposite of what they are for. The rule is one for all formats. GLP's
(`glp.mode`, `glp.hook_point`, `glp.rank`, …; antirez/ds4 pull request 970) and EasySteer's GGUF keys are
known by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bake.directions.formats.places import MAX_LAYERS, layer_number, parse_site
from bake.errors import DirectionError
from bake.io.foreign_json import parse_json
from bake.support.text import one_line

MAX_DEPTH = 6  # dots in a name
MAX_FIELD = 100_000  # characters of a string that is looked into
_SHOWN = 60
# bake's own metadata, which say nothing of the kind.
OWN = frozenset(("scale", "separation", "optimization", "understood", "parts", "orthogonalized"))

_ADDITIVE = frozenset(
    (
        *("add", "adds", "added", "additive", "additively", "addition", "plus", "sum", "actadd"),
        *("act_add", "add_vector", "vector_addition", "vector_add", "activation_addition"),
        *("activation_add", "steering_addition", "additive_steering", "residual_add", "caa"),
    )
)
# The last word of a field's name that says what is done with the vectors.
_OPERATIONS = frozenset(("mode", "operation", "op", "operator", "intervention", "application"))
_OPERATION_WORDS = frozenset(("intervention", "steering", "steer", "edit", "apply", "application"))
# Modes of something else than the vectors' use.
_OTHER_MODES = frozenset(
    (
        *("token", "tokens", "pooling", "pool", "position", "extraction", "extract", "aggregation"),
        *("padding", "training", "train", "chat", "quantization", "template", "capture", "eval"),
        *("inference", "thinking", "reasoning", "prompt", "data", "file", "read", "generation"),
        *("sampling", "dtype", "collection", "pair", "pairing", "normalization", "norm", "scoring"),
    )
)
# Names of an operation that stand for yes or no.
_FLAGS = frozenset(
    (
        *("ablate", "ablation", "project", "projection", "projective", "project_out"),
        *("orthogonalize", "orthogonalise", "clamp", "clamping", "multiply", "multiplicative"),
    )
)
# Values of "method", "algorithm", "type" that are an operation and not a way of finding.
_METHODS = frozenset(("method", "algorithm", "technique", "type", "kind"))
_OTHER_OPERATION = re.compile(
    r"(?:(?:directional|direction|activation|weight|affine|linear|mean|zero)_)?"
    r"(?:ablat\w*|ablit\w*|project(?:ion|ive|ed|_out)?|orthogonali[sz]\w*|clamp\w*|multipl\w*"
    r"|reflect\w*|rotat\w*|replace\w*)"
)
_SITES = (
    *("hook_point", "hookpoint", "hook_name", "hook", "hook_site", "site", "activation_site"),
    *("steering_site", "layer_type", "component", "module", "module_name", "module_type"),
    *("target_module", "location", "stream", "insertion_point", "apply_at", "applied_at"),
    *("activation_name", "act_name", "hook_type", "injection_site", "injection_point"),
)
# The whole name behind its last dot, or n_layer would be one.
_LAYER = (
    *("layer", "layer_index", "layer_idx", "layer_id", "layer_number", "hook_layer"),
    *("target_layer", "source_layer", "steering_layer", "injection_layer"),
)
_LAYERS = ("layers", "layer_indices", "layer_ids", "layer_idxs", "layer_numbers", "layer_list")
_REMEDY = "which bake would not do: it adds directions; give a direction that is meant to be added"


@dataclass(frozen=True)
class Declared:
    """A file's own words. site: one of bake's. layer and layers: 0-based. notes: phrases on them."""

    site: str | None = None
    layer: int | None = None
    layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def read_declared(
    fields: Mapping[Any, Any], origin: str, *, layer_output_only: bool = False
) -> Declared:
    """Return what fields say of site and layers. Raises DirectionError, naming the field and its value.

    fields: strings, numbers, booleans, lists and mappings of these; anything else is passed over.
    layer_output_only: for a format whose vectors are added to a layer's output by definition.
    """
    site: str | None = None
    layer: int | None = None
    layers: tuple[int, ...] = ()
    notes: list[str] = []
    for name, value in _flatten(fields):
        words = _words(name)
        _check_operation(name, words, value, origin)
        _check_projection_format(name, value, origin)
        key, leaf = "_".join(words), "_".join(_words(name.rpartition(".")[2]))
        if isinstance(value, str) and value.strip() and _is_site(key):
            place = parse_site(value)
            if place.unknown or (layer_output_only and not place.is_layer_output):
                raise DirectionError(
                    f"{origin} says {_show(name, value)}, which is not "
                    + ("the layer's output" if layer_output_only else "one of bake's sites")
                    + "; give a direction of the residual stream, or of another site that bake has"
                )
            if site is not None and place.site not in (None, site):
                raise DirectionError(
                    f"{origin} says two sites, {site} and {_show(name, value)}; correct its fields"
                )
            site = place.site or site
            layer = place.layer if place.layer is not None else layer
            if place.meaning:
                notes.append(f"{_show(name, value)}: {place.meaning}")
        elif leaf in _LAYER:
            layer = _read_layer(name, value, origin, layer)
        elif leaf in _LAYERS:
            layers = _read_layers(name, value, origin) or layers
    return Declared(site, layer, layers, tuple(notes))


def is_layer_list(name: Any) -> bool:
    """Tell whether a list of this name says which layers the rows of another array are."""
    return isinstance(name, str) and "_".join(_words(name.rpartition(".")[2])) in (
        *_LAYER,
        *_LAYERS,
    )


def _check_operation(name: str, words: list[str], value: Any, origin: str) -> None:
    """Raise DirectionError for a field that says that the vectors are not to be added."""
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    said = "_".join(_words(value)) if isinstance(value, str) else ""
    yes = (
        said not in ("", "0", "no", "none", "false", "null") if said or value == "" else bool(value)
    )
    is_operation = (
        last in _OPERATIONS or (last in ("type", "method") and before in _OPERATION_WORDS)
    ) and before not in _OTHER_MODES
    if is_operation and isinstance(value, str | int | float) and value != "":
        refused = said not in _ADDITIVE and value not in ("+", "+=")
    elif {last, "_".join(words[-2:])} & _FLAGS or "clamp" in words:
        refused = yes and isinstance(value, str | int | float)
    elif last in ("add", "additive"):
        refused = not yes and value is not None and value != ""
    else:
        refused = last in _METHODS and _OTHER_OPERATION.fullmatch(said) is not None
    if refused:
        raise DirectionError(f"{origin} says {_show(name, value)}, {_REMEDY}")


def _check_projection_format(name: str, value: Any, origin: str) -> None:
    """Raise DirectionError for what GLP says of a file in other words than `glp.mode`."""
    refused = {
        "glp.rank": value not in (0, 1),
        "glp.spec_version": value not in (0, 1),
        "glp.structure": value not in ("per-layer", "per_layer", ""),
    }.get(
        name, name.startswith("dspark.")
    )  # dspark.*: GLP before it had the name, always projecting
    if refused:
        raise DirectionError(f"{origin} says {_show(name, value)}, {_REMEDY}")


def _read_layer(name: str, value: Any, origin: str, known: int | None) -> int | None:
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    negative = str(value).strip().startswith("-") and str(value).strip()[1:].isdecimal()
    if negative:
        raise DirectionError(
            f"{origin} says {_show(name, value)}, which counts from the end; name the layer from 0 on"
        )
    layer = layer_number(value)
    return known if layer is None else layer


def _read_layers(name: str, value: Any, origin: str) -> tuple[int, ...]:
    """Return a list of layers; none for a mere number of layers, or for other things."""
    if isinstance(value, str):
        text = value.strip().strip("[]()")
        value = [part.strip() for part in text.split(",")] if "," in text else []
    if not isinstance(value, list | tuple) or len(value) > MAX_LAYERS:
        return ()
    found = [_read_layer(name, entry, origin, None) for entry in value]
    return tuple(layer for layer in found if layer is not None) if None not in found else ()


def _flatten(
    fields: Mapping[Any, Any], prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield fields by dotted names, those of mappings in them and of JSON objects in strings too.

    A mapping that is referred to many times, or contains itself, is looked into once.
    """
    seen = set() if seen is None else seen
    for key, value in fields.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str) or (not prefix and key in OWN):
            continue
        if isinstance(value, str) and value.lstrip()[:1] == "{" and len(value) <= MAX_FIELD:
            value = _parse(value)
        if isinstance(value, Mapping):
            if id(value) not in seen and name.count(".") < MAX_DEPTH:
                seen.add(id(value))
                yield from _flatten(value, f"{name}.", seen)
        else:
            yield name, value


def _parse(text: str) -> Any:
    try:
        return parse_json(text, "a field", error=DirectionError)
    except DirectionError:
        return text  # A text that begins with a brace.


def _words(text: str) -> list[str]:
    """Return a name's words in lower case: hookPoint, hook-point and hook.point are two words."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text[:MAX_FIELD])
    return re.sub(r"[^a-z0-9]+", " ", spaced.lower()).split() or [""]


def _is_site(key: str) -> bool:
    return any(key == name or key.endswith(f"_{name}") for name in _SITES)


def _show(name: str, value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return f"{one_line(name, _SHOWN)} = {one_line(text, _SHOWN)}"
