"""Why there: what each layer of the band contributes, and the smallest band that keeps the shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.card.figures import draw_layers
from bake.support.tables import format_table
from bake.sweeps.arms import Arm
from bake.sweeps.design import compute_variant_push
from bake.sweeps.measurements import (
    Each,
    Sampling,
    Texts,
    measure_each,
    measure_neutral,
    measure_pairs,
)
from bake.sweeps.points import Point
from bake.sweeps.summary import summarise

if TYPE_CHECKING:
    from bake.directions.direction import Direction
    from bake.models.forward import LanguageModel
    from bake.strength.coefficients import Push
    from bake.sweeps.design import Variant

Bounds = tuple[int, int]  # of a part of the band: its first layer, and the one after its last
KEPT_SHARE = 0.9
EDGES = 12  # bands of more layers are cut at every second, third, … layer


@dataclass(frozen=True)
class LayerShare:
    """One layer's part at m = 1. Shifts in nats a token, kl the 95th percentile on neutral text.

    alone: with this layer pushed only; lost: what the whole band's shift loses without it.
    """

    layer: int
    alone: float
    lost: float
    kl_alone: float
    kl_without: float


@dataclass(frozen=True)
class Attribution:
    """What the band's layers contribute. smallest: [start, stop) that keeps 90 % of the shift."""

    layers: tuple[LayerShare, ...]
    shift: float
    kl: float
    smallest: tuple[int, int]
    smallest_shift: float
    smallest_kl: float

    @property
    def is_whole(self) -> bool:
        """Whether no smaller band will do."""
        first, last = self.layers[0].layer, self.layers[-1].layer
        return self.smallest == (first, last + 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `report.json`."""
        return {**asdict(self), "smallest": list(self.smallest)}

    def draw(self, path: Path) -> Path:
        """Draw what every layer gives and what is lost without it."""
        title = "What each layer of the band contributes at m = 1"
        return draw_layers(path, [asdict(entry) for entry in self.layers], title)

    def describe(self) -> str:
        """Return a table of the layers, and the smallest band."""
        rows = [
            (
                str(entry.layer),
                f"{entry.alone:+.3f}",
                f"{entry.lost:+.3f}",
                f"{entry.kl_alone:.3f}",
                f"{entry.kl_without:.3f}",
            )
            for entry in self.layers
        ]
        header = ("layer", "shift alone", "lost without", "KL alone", "KL without")
        start, stop = self.smallest
        if self.is_whole:
            return (
                f"{format_table(header, rows)}\n\nno smaller band keeps {KEPT_SHARE:.0%} of the shift "
                f"({self.shift:+.3f})"
            )
        return (
            f"{format_table(header, rows)}\n\nthe smallest band that keeps {KEPT_SHARE:.0%} of the shift "
            f"({self.shift:+.3f}): layers {start} to {stop - 1}, {self.smallest_shift:+.3f} at "
            f"KL {self.smallest_kl:.3f} instead of {self.kl:.3f}"
        )


def attribute(
    loaded: LanguageModel,
    direction: Direction,
    variant: Variant,
    texts: Texts,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    each: Callable[[str], Each] = lambda _stage: measure_each,
) -> Attribution:
    """Push every contiguous part of the band at m = 1, and every layer left out, and compare.

    All arms of a text go through together, about a hundred of them for a band of 12 layers.
    """
    push = compute_variant_push(direction, variant, norms, layer_count, loaded.hidden_size)
    layers = [entry.layer for entry in push.layers]
    parts, without = _make_arms(push, variant)
    arms = [Arm("base", "base"), *parts.values(), *without.values()]
    measured = {
        "pairs": measure_pairs(
            loaded,
            arms,
            texts.pairs,
            each("layers: pairs"),
            chat_template=texts.chat_template,
        ),
        "neutral": measure_neutral(
            loaded,
            arms,
            texts.neutral,
            each("layers: neutral"),
            chat_template=texts.chat_template,
        ),
    }
    points = {
        point.arm.name: point
        for point in summarise(arms, measured, loaded.tokenizer, texts, Sampling())
    }
    effects = {bounds: _Effect.of(points[arm.name]) for bounds, arm in parts.items()}
    rests = {layer: _Effect.of(points[arm.name]) for layer, arm in without.items()}
    return _compare(layers, effects, rests, nothing=_Effect.of(points["base"]))


def _make_arms(push: Push, variant: Variant) -> tuple[dict[Bounds, Arm], dict[int, Arm]]:
    """Return {bounds: a contiguous part of the band} and {layer: the band without it}."""
    layers = [entry.layer for entry in push.layers]

    def arm(name: str, chosen: Sequence[int]) -> Arm:
        return Arm(
            name,
            "direction",
            1.0,
            variant.site,
            variant.law,
            (chosen[0], chosen[-1] + 1),
            push={layer: push.vectors[layer] for layer in chosen},
        )

    step = -(-len(layers) // EDGES)
    edges = [*layers[::step], layers[-1] + 1]
    wanted = [(start, stop) for start in edges for stop in edges if start < stop]
    wanted += [(layer, layer + 1) for layer in layers]
    parts = {
        (start, stop): arm(
            f"layers {start}:{stop}", [layer for layer in layers if start <= layer < stop]
        )
        for start, stop in dict.fromkeys(wanted)
    }
    without = {
        layer: arm(f"without {layer}", [other for other in layers if other != layer])
        for layer in layers
        if len(layers) > 1
    }
    return parts, without


@dataclass(frozen=True)
class _Effect:
    """What an arm does: the pairs' shift in nats a token, the KL on neutral text (95th percentile)."""

    shift: float
    kl: float

    @staticmethod
    def of(point: Point) -> _Effect:
        assert point.shift is not None
        return _Effect(point.shift.value, point.neutral_kl["p95"].value)


def _compare(
    layers: Sequence[int],
    parts: Mapping[Bounds, _Effect],
    without: Mapping[int, _Effect],
    nothing: _Effect,
) -> Attribution:
    """Say what each layer gives, and find the smallest part that keeps most of the shift."""
    whole = parts[layers[0], layers[-1] + 1]
    shares = []
    for layer in layers:
        alone, rest = parts[layer, layer + 1], without.get(layer, nothing)
        shares.append(LayerShare(layer, alone.shift, whole.shift - rest.shift, alone.kl, rest.kl))
    keeping = [bounds for bounds, part in parts.items() if part.shift / whole.shift >= KEPT_SHARE]
    smallest = min(keeping, key=lambda bounds: (bounds[1] - bounds[0], bounds[0]))
    chosen = parts[smallest]
    return Attribution(tuple(shares), whole.shift, whole.kl, smallest, chosen.shift, chosen.kl)
