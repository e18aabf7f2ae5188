"""Which layer's direction is taken out of the stream: chosen on pairs that it was not found from.

As Arditi et al. (arXiv 2406.11717, section 2.3) choose it: every layer's direction is taken out everywhere
by hooks, that which moves held-out pairs furthest from the positive side wins, among those that leave
neutral text within a bound of KL, and the last fifth of the layers, which only choose words, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bake.directions.direction import Direction
from bake.directions.subspace import of_layer, span
from bake.errors import BakeError
from bake.support.text import list_numbers
from bake.sweeps.arms import Arm
from bake.sweeps.design import BASE
from bake.sweeps.measurements import (
    Each,
    Measurements,
    Sampling,
    Texts,
    measure_each,
    measure_neutral,
    measure_pairs,
)
from bake.sweeps.points import Point, in_short
from bake.sweeps.summary import summarise
from bake.sweeps.window import Bounds
from bake.texts.pair_tokens import describe_template
from bake.writes import Ablation, MappedAblation, WriteMap

if TYPE_CHECKING:
    from bake.models.forward import LanguageModel

# The paper bounds the mean KL by 0.1 nats; on SmolLM2-135M that is a 95th percentile of 0.2 to 0.35.
BOUNDS = Bounds(kl=0.3)
SHARE = 0.8  # of the depth: later layers' directions are not tried
COARSE = 4  # pairs, on which all layers are tried
KEPT = 10  # layers, which are tried on all pairs
TOGETHER = 4  # whose cost is measured at a time, the best by their pairs first


@dataclass(frozen=True)
class LayerChoice:
    """Why this layer's direction: the largest net shift of held-out pairs within the bound on KL.

    points: {layer, shift, net_shift, neutral_kl_p95} of every layer that was tried on all pairs, in nats;
    KL of the best only. tried: how many layers were tried on some. template: as in `MultiplierChoice`.
    """

    layer: int
    bounds: Bounds
    pairs: int
    tried: int
    points: tuple[dict[str, float | None], ...]
    template: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json` and the card."""
        values = asdict(self)
        return {**values, **values.pop("template"), "reason": self.describe()}

    def describe(self) -> str:
        """Return the choice and its reason as a sentence."""
        chosen = next(point for point in self.points if point["layer"] == self.layer)
        return (
            f"layer {self.layer}'s direction, taken out everywhere, shifts {self.pairs} held-out pairs by "
            f"{chosen['shift']:+.2g} nats a token, of {self.tried} layers tried the furthest from the "
            f"positive side within the bound (KL {chosen['neutral_kl_p95']:.2g} on neutral text, bound "
            f"{self.bounds.kl:g})"
        )


def choose_layer(
    loaded: LanguageModel,
    writes: WriteMap,
    direction: Direction,
    texts: Texts,
    *,
    bounds: Bounds = BOUNDS,
    each: Callable[[str], Each] = lambda _stage: measure_each,
) -> LayerChoice:
    """Return the layer whose direction, taken out of the stream, moves held-out pairs most within bounds.

    direction: with a vector for each of several layers. each: stage → what measures its texts. Raises
    BakeError where none of them moves the pairs beyond doubt, and where all that do cost more than that.
    """
    texts = texts.suited_to(loaded.tokenizer)
    count = len(writes.by_layer)
    layers = sorted(layer for layer in direction.vectors if layer is not None)
    early = [layer for layer in layers if layer < SHARE * count] or layers
    arms = {layer: _arm(writes, direction, layer, count, loaded) for layer in early}
    few_pairs = replace(texts, pairs=texts.pairs[:COARSE])
    coarse = _try(loaded, arms, early, few_pairs, each("layers: few pairs"))
    kept = sorted(sorted(early, key=lambda layer: -_moved(coarse[layer])[0])[:KEPT])
    found = _try(loaded, arms, kept, texts, each("layers: pairs"))
    ranked = sorted(
        (layer for layer in kept if _moved(found[layer])[1] > 0),
        key=lambda layer: -_moved(found[layer])[0],
    )
    if not ranked:
        best = max(kept, key=lambda layer: _moved(found[layer])[0])
        raise BakeError(
            f"taking the direction out moves none of the {len(texts.pairs)} held-out pairs from the "
            f"positive side beyond doubt, whichever of layers {list_numbers(early)} it is from (at best "
            f"{_moved(found[best])[0]:+.3f} nats a token, layer {best}): give other pairs, or "
            "--from-layer L"
        )
    chosen: int | None = None
    for start in range(0, len(ranked), TOGETHER):
        few = ranked[start : start + TOGETHER]
        some = [Arm(BASE, "base"), *(arms[layer] for layer in few)]
        neutral = measure_neutral(
            loaded,
            some,
            texts.neutral,
            each(f"layers: neutral {start}"),
            chat_template=texts.chat_template,
        )
        costed = _points(some, {"neutral": neutral}, loaded, texts)[1:]
        for layer, point in zip(few, costed, strict=True):
            found[layer] = replace(found[layer], neutral_kl=point.neutral_kl)
        within = [layer for layer in few if _cost(found[layer]) <= bounds.kl]
        if within:
            chosen = within[0]
            break
    if chosen is None:
        cheapest = min(ranked, key=lambda layer: _cost(found[layer]))
        raise BakeError(
            f"every layer's direction that moves held-out pairs costs more than KL {bounds.kl:g} on "
            f"neutral text (the least {_cost(found[cheapest]):.2g}, layer {cheapest}): give "
            f"--from-layer {cheapest} to take it all the same, or --scope writes with a --strength below 1"
        )
    return LayerChoice(
        chosen,
        bounds,
        len(texts.pairs),
        len(early),
        tuple(_in_short(layer, found[layer]) for layer in kept),
        describe_template(loaded.tokenizer, texts.pairs, texts.chat_template),
    )


def _try(
    loaded: LanguageModel,
    arms: Mapping[int, Arm],
    layers: Sequence[int],
    texts: Texts,
    each: Each,
) -> dict[int, Point]:
    """Return {layer: what taking its direction out does to pairs}."""
    some = [Arm(BASE, "base"), *(arms[layer] for layer in layers)]
    measured = measure_pairs(loaded, some, texts.pairs, each, chat_template=texts.chat_template)
    points = _points(some, {"pairs": measured}, loaded, texts)[1:]
    return dict(zip(layers, points, strict=True))


def _arm(
    writes: WriteMap, direction: Direction, layer: int, count: int, loaded: LanguageModel
) -> Arm:
    basis = span([of_layer(direction, layer)], range(count), loaded.hidden_size)
    removal = MappedAblation(writes, Ablation(basis))
    return Arm(f"layer {layer}", "ablation", -1.0, band=(0, count), removal=removal)


def _points(
    arms: Sequence[Arm],
    measured: Mapping[str, Measurements],
    loaded: LanguageModel,
    texts: Texts,
) -> tuple[Point, ...]:
    return summarise(arms, measured, loaded.tokenizer, texts, Sampling())


def _moved(point: Point) -> tuple[float, float]:
    """Return the net shift away from the positive side, and the lower end of its interval."""
    assert point.net_shift is not None
    return point.net_shift.value, point.net_shift.low


def _cost(point: Point) -> float:
    found = point.neutral_kl.get("p95")
    return float("inf") if found is None else found.value


def _in_short(layer: int, point: Point) -> dict[str, float | None]:
    return {
        "layer": layer,
        "shift": in_short(point.shift),
        "net_shift": in_short(point.net_shift),
        "neutral_kl_p95": in_short(point.neutral_kl.get("p95")),
    }
