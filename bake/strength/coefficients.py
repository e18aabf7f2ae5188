"""How strongly each layer is pushed: the laws, the band, and the push they give.

Pure functions of numbers and vectors: nothing here touches a model or a file. The default law and its
source: "Calibrating activation vectors using norm" (LessWrong, JwQpzdk4kQsYdhg4N), α_l = m·μ_l/√d.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError

if TYPE_CHECKING:
    import torch

Law = Callable[[Mapping[int, float], int], dict[int, float]]
DEFAULT_BAND = (0.4, 0.9)
_LAYERS = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_LONGEST_RANGE = 10_000  # No model has more than a thousand layers.


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# Each law maps the band's activation norms μ_l and the hidden size d to α_l at m = 1.
LAWS: dict[str, Law] = {
    "inverse-sqrt-d": lambda norms, d: {layer: mu / math.sqrt(d) for layer, mu in norms.items()},
    "sqrt-d": lambda norms, d: {layer: mu * math.sqrt(d) for layer, mu in norms.items()},
    "norm": lambda norms, d: dict(norms),
    "flat": lambda norms, d: dict.fromkeys(norms, _mean(list(norms.values())) / math.sqrt(d)),
}
DEFAULT_LAW = "inverse-sqrt-d"
EXPLICIT_LAW = "explicit"
LARGEST = 3.4e38  # what float32 holds
OWN_LENGTH_LAW = "own-length"  # α_l = m·‖v_l‖: the given vectors as long as they are (--keep-scale)


@dataclass(frozen=True)
class LayerPush:
    """One layer's share of a push. Relative influence is coefficient / activation_norm."""

    layer: int
    activation_norm: float
    coefficient: float

    @property
    def relative_influence(self) -> float:
        """|α_l| / μ_l, the share of the activation's length by which it is moved."""
        return abs(self.coefficient) / self.activation_norm

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        return {
            "layer": self.layer,
            "activation_norm": self.activation_norm,
            "coefficient": self.coefficient,
        }


@dataclass(frozen=True)
class Push:
    """{layer: α_l·û_l}, what plan, hooks and twin take, with the numbers it came from.

    vectors: {0-based layer: (hidden_size,) float32 tensor}. directions: the unit vectors û_l. given: the
    coefficients at m = 1 where the user or the direction's file gave them instead of a law.
    """

    law: str
    multiplier: float
    band: tuple[int, int]
    hidden_size: int
    layers: tuple[LayerPush, ...]
    directions: Mapping[int, torch.Tensor]
    given: Mapping[int, float] | None = None

    @property
    def vectors(self) -> dict[int, torch.Tensor]:
        """The push itself: coefficient × unit vector, rounded once to float32."""
        return {
            entry.layer: (self.directions[entry.layer].double() * entry.coefficient).float()
            for entry in self.layers
        }

    @property
    def warning(self) -> str | None:
        """A sentence on a push that is longer than what it is added to; None for any other."""
        worst = max(self.layers, key=lambda entry: entry.relative_influence)
        if worst.relative_influence <= 1:
            return None
        return (
            f"at m = {self.multiplier:g} the push is {worst.relative_influence:.3g} times as long as the "
            f"activations of layer {worst.layer} (α = {worst.coefficient:.3g}, norm "
            f"{worst.activation_norm:.3g}), so little of what the model works out is left: try a smaller m"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        given = {}
        if self.given:
            named = {str(layer): value for layer, value in sorted(self.given.items())}
            given = {"given_coefficients": named}
        return {
            "law": self.law,
            "multiplier": self.multiplier,
            "band": list(self.band),
            "hidden_size": self.hidden_size,
            "layers": [entry.to_dict() for entry in self.layers],
            **given,
        }

    def at(self, multiplier: float) -> Push:
        """Return the same push at another multiplier, bit for bit as `compute_push` would make it."""
        norms = {entry.layer: entry.activation_norm for entry in self.layers}
        unit = self.given or LAWS[self.law](norms, self.hidden_size)
        layers = tuple(
            replace(entry, coefficient=multiplier * unit[entry.layer]) for entry in self.layers
        )
        _check_finite(multiplier, layers)
        return replace(self, multiplier=multiplier, layers=layers)


def _check_finite(multiplier: float, layers: Sequence[LayerPush]) -> None:
    for entry in layers:
        if not abs(entry.coefficient) <= LARGEST:
            raise BakeError(
                f"multiplier {multiplier:g} pushes layer {entry.layer} by {entry.coefficient:g}, more than "
                "a float32 can hold; give one nearer to 1"
            )


def band_layers(layer_count: int, band: tuple[float, float] = DEFAULT_BAND) -> range:
    """Return the 0-based layers of a band given as shares of the depth.

    `range(int(start·L), int(stop·L))`. Raises BakeError where the band holds no layer.
    """
    start, stop = band
    # The tolerance keeps 0.7 · 10 = 7.000000000000001 and its mirror from moving a layer.
    inside = 0 <= start < stop <= 1  # Also false for NaN.
    layers = (
        range(int(start * layer_count + 1e-9), int(stop * layer_count + 1e-9))
        if inside
        else range(0)
    )
    if not layers:
        shares = 0 <= 10000 * start < 10000 * stop <= 100  # written as 0.4:0.9
        meant = f"{10000 * start:g}:{10000 * stop:g}" if shares else "40:90"
        raise BakeError(
            f"the band {100 * start:g}:{100 * stop:g} % of {layer_count} layers holds no layer; "
            + (f"did you mean {meant}?" if shares else f"give one such as --band {meant}")
        )
    return layers


def parse_band(text: str) -> tuple[float, float]:
    """Parse '40:90' (per cent of the depth) into shares of the depth."""
    try:
        start, stop = (float(part) / 100 for part in text.split(":"))
    except ValueError:
        raise BakeError(f"the band {text!r} is not START:STOP in per cent, such as 40:90") from None
    if stop <= start:
        turned = f"{100 * stop:g}:{100 * start:g}" if stop < start else "40:90"
        raise BakeError(f"the band {text!r} ends before it begins; did you mean {turned}?")
    if not (start >= 0 and stop <= 1):  # Also for NaN.
        raise BakeError(f"the band {text!r} is not within 0:100 per cent; give one such as 40:90")
    return start, stop


def write_band(shares: Sequence[Any]) -> str:
    """Return a band given as shares of the depth, such as (0.4, 0.9), as '40:90'."""
    try:
        start, stop = (float(share) for share in shares)
    except (TypeError, ValueError):
        start, stop = math.nan, math.nan
    if not (0 <= start <= 1 and 0 <= stop <= 1):
        raise BakeError(
            f"the band {tuple(shares)!r} is not two shares of the depth, such as (0.4, 0.9)"
        )
    return f"{100 * start:.12g}:{100 * stop:.12g}"


def band_of(layers: Sequence[int], layer_count: int) -> str | None:
    """Return the --band that holds just these layers, such as "34:45"; None where they have gaps."""
    first, stop = min(layers), max(layers) + 1
    if sorted(layers) != list(range(first, stop)):
        return None
    # Whole per cent tell a hundred layers apart; some models have more.
    for unit in (100, 1000, 10_000):
        start, end = (-(-layer * unit // layer_count) / unit for layer in (first, stop))
        if start < end and band_layers(layer_count, (start, end)) == range(first, stop):
            return f"{100 * start:g}:{100 * end:g}"
    return None


def parse_layers(text: str) -> list[int]:
    """Parse '3,5-8' into 0-based layers, in order and each once."""
    layers: set[int] = set()
    for part in text.split(","):
        found = _LAYERS.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not 0 <= last - first < _LONGEST_RANGE:
            raise BakeError(f"the layers {text!r} are not a list such as 3,5-8")
        layers.update(range(first, last + 1))
    return sorted(layers)


def parse_coefficients(text: str) -> dict[int, float]:
    """Parse '6=0.5,8=1.0' into {0-based layer: coefficient}."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        coefficients = {int(layer): float(value) for layer, value in pairs}
    except ValueError:
        raise BakeError(
            f"the coefficients {text!r} are not LAYER=VALUE,…, such as 6=0.5,8=1.0"
        ) from None
    if len(coefficients) != len(pairs):
        raise BakeError(f"the coefficients {text!r} name a layer twice")
    return coefficients


def apply_law(law: str, norms: Mapping[int, float], hidden_size: int) -> dict[int, float]:
    """Return {layer: α_l at m = 1} by a law, from {layer: μ_l}. Raises BakeError for an unknown law."""
    if law not in LAWS:
        raise BakeError(f"unknown law {law!r}; the laws are {', '.join(LAWS)}")
    return LAWS[law](norms, hidden_size)


def compute_push(
    norms: Mapping[int, float],
    directions: Mapping[int, torch.Tensor],
    *,
    hidden_size: int,
    multiplier: float = 1.0,
    law: str = DEFAULT_LAW,
    given: Mapping[int, float] | None = None,
) -> Push:
    """Return the push of a band.

    norms: {layer: μ_l} for the band's layers. directions: {layer: unit (hidden_size,) tensor} for at
    least these. given: {layer: α_l at m = 1} for at least these, which replace the law's; `law` then
    only names where they come from. m multiplies either.
    Raises BakeError for an unknown law, a multiplier of zero, a norm that is not a positive number, or
    coefficients that are not finite or all zero.
    """
    if multiplier == 0 or not math.isfinite(multiplier):
        raise BakeError(
            f"multiplier {multiplier:g}: it must be finite and not zero; give a number such as 1.0"
        )
    for layer, norm in norms.items():
        if not (math.isfinite(norm) and norm > 0):
            raise BakeError(
                f"the activation norm of layer {layer} is {norm}, not a positive number"
            )
        if given is not None and not math.isfinite(given[layer]):
            raise BakeError(
                f"the coefficient of layer {layer} is {given[layer]}, not a finite number"
            )
    unit = apply_law(law, norms, hidden_size) if given is None else given
    layers = tuple(
        LayerPush(layer, float(norms[layer]), multiplier * unit[layer]) for layer in sorted(norms)
    )
    if not any(entry.coefficient for entry in layers):
        raise BakeError("every coefficient is zero; give at least one that is not")
    _check_finite(multiplier, layers)
    return Push(
        law=law,
        multiplier=multiplier,
        band=(layers[0].layer, layers[-1].layer + 1),
        hidden_size=hidden_size,
        layers=layers,
        directions={entry.layer: directions[entry.layer] for entry in layers},
        given=None if given is None else {layer: given[layer] for layer in norms},
    )
