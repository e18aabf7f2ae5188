"""A direction: unit vectors with the site they were found at, and the file they live in.

A direction file is safetensors: one tensor `direction` of shape (hidden_size,) for all layers, or
`direction.{l}` for 0-based decoder layer l; metadata strings `site`, `model`, `method`, `token` and
what else is known. How directions are found is `bake.directions.fit`'s business; what other tools write is
read by `bake.directions.formats`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bake.errors import DirectionError
from bake.support.html import show
from bake.support.text import list_numbers, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bake.models.forward import LanguageModel

_LAYER_KEY = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
DEFAULT_SITE = "mlp_out"
# A vector this much shorter than the longest of its file, or of values that its dtype hardly resolves, is
# what rounding leaves of zero: no layer of a model is a million times less than another.
NOISE = 1e-6
SUBNORMAL_STEPS = 4
ABSENT = "zero, or rounding noise beside the other layers"
MOST_SHOWN = 12  # entries of metadata in a notebook
SCALE_KEY = "scale"  # in metadata: {layer: length} of vectors that are stored as unit vectors


@dataclass(frozen=True)
class Part:
    """One direction of a sum: its name, what was asked for, and what the sum gives, per layer.

    effective: {layer, or None for all: e_i}. kept: {layer: share of its length that orthogonalising
    left}, 1 everywhere without it.
    """

    name: str
    strength: float
    effective: Mapping[int | None, float]
    kept: Mapping[int | None, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: means over layers, and the range."""
        values = list(self.effective.values())
        return {
            "name": self.name,
            "strength": self.strength,
            "effective_strength": math.fsum(values) / len(values),
            "effective_range": [min(values), max(values)],
            "kept": min(self.kept.values()),
        }


def check_fit(width: int, hidden_size: int, metadata: Mapping[str, str]) -> None:
    """Raise DirectionError where vectors are wider or narrower than the model's residual stream."""
    if width != hidden_size:
        origin = metadata.get("model") or "another model"
        raise DirectionError(
            f"the direction is {width} wide and the model's hidden size is {hidden_size}; it was found "
            f"on {origin}"
        )


@dataclass(frozen=True)
class Direction:
    """Unit vectors û_l, float32, (hidden_size,) each; key None holds one vector for all layers.

    lengths: ‖v_l‖ of the vectors as they were given, by the same keys; empty where they were unit
    vectors all along. Only `--keep-scale` asks for them, and a sum: `parts` are the directions that it
    was made of, and its lengths say how much longer it is than one unit vector. absent: layers that
    were left out, because there is nothing to point along: see `ABSENT`.
    """

    vectors: Mapping[int | None, torch.Tensor]
    site: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[int | None, float] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    absent: tuple[int, ...] = ()

    @property
    def hidden_size(self) -> int:
        """The width of the vectors."""
        return int(next(iter(self.vectors.values())).shape[0])

    def layer(self, layer: int) -> torch.Tensor:
        """Return û_l; raise DirectionError where the file has none for this layer."""
        if None in self.vectors:
            return self.vectors[None]
        if layer not in self.vectors:
            known = ", ".join(
                str(index) for index in sorted(k for k in self.vectors if k is not None)
            )
            reason = f" ({ABSENT})" if layer in self.absent else ""
            raise DirectionError(
                f"the direction has no vector for layer {layer}{reason}; it has layers {known}"
            )
        return self.vectors[layer]

    def __repr__(self) -> str:
        return f"<Direction: {self.summary}>"

    def _repr_html_(self) -> str:
        shown = list(self.metadata.items())[:MOST_SHOWN]
        rows = [
            (key, one_line(text, 120)) for key, text in shown if not text.startswith(("{", "["))
        ]
        return show(f"Direction: {self.summary}", ("what is known", ""), rows)

    @property
    def summary(self) -> str:
        """The direction in a few words: layers, width, site, and how it was found."""
        layers = [layer for layer in self.vectors if layer is not None]
        where = f"layers {list_numbers(layers)}" if layers else "one vector for all layers"
        found = [self.metadata[key] for key in ("method", "pairs_name") if key in self.metadata]
        how = f", by {' of '.join(found)}" if found else ""
        return f"{where}, width {self.hidden_size}, at {self.site}{one_line(how)}"

    def select(self, layers: Iterable[int], hidden_size: int) -> dict[int, torch.Tensor]:
        """Return {layer: û_l}; raise DirectionError where the width is not the model's."""
        check_fit(self.hidden_size, hidden_size, self.metadata)
        return {layer: self.layer(layer) for layer in layers}

    def own_lengths(self, layers: Iterable[int]) -> dict[int, float]:
        """Return {layer: ‖v_l‖} of the vectors as they were given; 1 where nothing is recorded."""
        shared = self.lengths.get(None, 1.0)
        return {layer: self.lengths.get(layer, shared) for layer in layers}

    def check_layers(self, layer_count: int) -> None:
        """Raise DirectionError for a vector of a layer that a model of `layer_count` does not have."""
        last = max((layer for layer in self.vectors if layer is not None), default=0)
        if last >= layer_count:
            remedy = (
                "if its file counts layers from 1, pass a --layer-offset one lower (-1)"
                if last == layer_count
                else "give one that was found on this model"
            )
            raise DirectionError(
                f"the direction has a vector for layer {last} and the model has layers 0 to "
                f"{layer_count - 1}; {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the vectors."""
        return {
            "site": self.site,
            "hidden_size": self.hidden_size,
            "layers": "all"
            if None in self.vectors
            else sorted(k for k in self.vectors if k is not None),
            "metadata": dict(self.metadata),
        }


def normalise(vector: torch.Tensor, name: str) -> torch.Tensor:
    """Return the float32 unit vector; raise DirectionError for a wrong shape, zeros or NaN."""
    if vector.ndim != 1:
        raise DirectionError(
            f"{name} has shape {tuple(vector.shape)}; a direction is one vector of shape (hidden_size,)"
        )
    return (vector.double() / measure_length(vector, name)).float()


def measure_length(vector: torch.Tensor, name: str) -> float:
    """Return ‖v‖ in float64; raise DirectionError for zeros, NaN, or a length that is no number."""
    wide = vector.double()
    if not bool(wide.isfinite().all()):
        raise DirectionError(f"{name} holds NaN or infinite values; find it again in float32")
    length = float(wide.norm())
    if length == 0:
        raise DirectionError(f"{name} is all zeros, which points nowhere")
    if not math.isfinite(length):
        raise DirectionError(f"{name} holds values too large to measure; find it again in float32")
    return length


def convert_to_input(
    direction: Direction,
    loaded: LanguageModel,
    site: str,
    layers: Sequence[int],
) -> Direction:
    """Carry a residual direction to a normalised input: û ← normalise(norm weight ⊙ û), per layer.

    The norm's weight is read off its behaviour, so that a norm that multiplies by 1 + w (Gemma) is
    converted like one that multiplies by w. Raises DirectionError where no norm feeds the site.
    """
    if any(site not in loaded.structure.at(layer).input_norms for layer in layers):
        raise DirectionError(
            f"no norm's output is {site} in this architecture, so a residual direction cannot be "
            f"converted; find one there (bake direction --site {site})"
        )
    vectors: dict[int | None, torch.Tensor] = {
        layer: normalise(
            direction.layer(layer)
            * effective_weight(
                loaded.layer(layer, loaded.structure.at(layer).input_norms[site]),
                direction.hidden_size,
            ),
            f"the direction converted to {site} at layer {layer}",
        )
        for layer in layers
    }
    return Direction(vectors, site, {**direction.metadata, "converted_from": direction.site})


def effective_weight(norm: nn.Module, hidden_size: int) -> torch.Tensor:
    """Return what a norm multiplies its normalised input by, (hidden_size,), on the CPU.

    x = (1, −1, 1, …) has mean 0 and mean square 1, so RMSNorm and LayerNorm leave it as it is:
    (norm(x) − norm(−x)) / 2 = weight ⊙ x.
    """
    x = _ones(norm, hidden_size)
    x[..., 1::2] = -1
    return _odd_part(norm, x) * x[0, 0].float().cpu()


def removes_mean(norm: nn.Module, hidden_size: int) -> bool:
    """Tell whether a norm takes its input's mean out, as a LayerNorm does: then a constant is nothing."""
    return float(_odd_part(norm, _ones(norm, hidden_size)).abs().max()) < 1e-3


def _ones(norm: nn.Module, hidden_size: int) -> torch.Tensor:
    import torch

    parameter = next(norm.parameters(), torch.empty(0))  # Some norms have no weight.
    return torch.ones(1, 1, hidden_size, device=parameter.device, dtype=parameter.dtype)


def _odd_part(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return (norm(x) − norm(−x)) / 2, in which no bias is left: (hidden_size,) float32 on the CPU."""
    import torch

    with torch.no_grad():
        half: torch.Tensor = (norm(x) - norm(-x)) / 2
    return half[0, 0].float().cpu()


def normalise_all(
    vectors: Mapping[int | None, torch.Tensor],
    site: str,
    metadata: Mapping[str, str],
    origin: str,
) -> Direction:
    """Return the direction of vectors of any length, which it remembers; `origin` is for messages.

    vectors: (hidden_size,) of any real dtype. Raises DirectionError, naming the vector, for a dtype
    that is no real number's, a wrong shape, NaN, nothing but zeros, and for vectors of different widths.
    Layers that hold nothing (`find_absent`) are left out.
    """
    names = {
        layer: f"{origin}: direction" + (f".{layer}" if layer is not None else "")
        for layer in vectors
    }
    for layer, vector in vectors.items():
        check_dtype(vector, names[layer])
    absent = find_absent(vectors)
    kept = {layer: vector for layer, vector in vectors.items() if layer not in absent}
    units = {layer: normalise(vector, names[layer]) for layer, vector in kept.items()}
    widths = {int(vector.shape[0]) for vector in units.values()}
    if len(widths) > 1:
        raise DirectionError(f"{origin} holds vectors of different widths: {sorted(widths)}")
    lengths = {layer: measure_length(vector, names[layer]) for layer, vector in kept.items()}
    return Direction(units, site, metadata, lengths, absent=absent)


def find_absent(vectors: Mapping[int | None, torch.Tensor]) -> tuple[int, ...]:
    """Return the layers whose vectors are zero or rounding noise beside the others, in order.

    None of them where all vectors are zero, or hold what is refused anyway. The other layers' lengths
    decide, and the dtype's resolution: float16 has four steps or less for values below 2.4e-7.
    """
    import torch

    if len(vectors) < 2:
        return ()
    lengths = {layer: float(vector.double().norm()) for layer, vector in vectors.items()}
    longest = max((length for length in lengths.values() if math.isfinite(length)), default=0.0)

    def is_noise(layer: int, vector: torch.Tensor) -> bool:
        smallest = torch.finfo(vector.dtype).smallest_normal * torch.finfo(vector.dtype).eps
        coarse = SUBNORMAL_STEPS * smallest
        largest = float(vector.double().abs().max()) if vector.numel() else 0.0
        return lengths[layer] <= NOISE * longest or largest <= coarse

    found = [
        layer for layer, vector in vectors.items() if layer is not None and is_noise(layer, vector)
    ]
    return tuple(sorted(found)) if longest > 0 and len(found) < len(vectors) else ()


def describe_absent(direction: Direction) -> str:
    """Return a phrase on the layers that were left out; empty where none was."""
    if not direction.absent:
        return ""
    several = "s" * (len(direction.absent) > 1)
    return f"layer{several} {list_numbers(direction.absent)} left out ({ABSENT})"


def check_dtype(vector: torch.Tensor, name: str) -> None:
    """Raise DirectionError for a dtype that no direction has: integers, booleans, complex numbers."""
    if not vector.dtype.is_floating_point:
        kind = str(vector.dtype).removeprefix("torch.")
        raise DirectionError(
            f"{name} holds {kind} values; a direction is of real numbers (float32)"
        )
