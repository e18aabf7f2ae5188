"""How good is a direction? Held-out pairs told apart, stability, agreement of layers, size.

Nothing here runs a model: it works on activations that have been read. Without held-out pairs every
pair is scored by a direction that was found without it (cross-validation with seeded folds), so the
figures never flatter a direction with the pairs it was fitted to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bake.directions.activations import PairActivations
from bake.directions.direction import Direction
from bake.errors import DirectionError
from bake.io.foreign_json import parse_json
from bake.models.generation import bootstrap_interval

if TYPE_CHECKING:
    import torch

FOLDS = 5
LEAST_PAIRS = 4
CHANCE = 0.5
KEY = "separation"  # in a direction file's metadata

Fit = Callable[[PairActivations], Mapping[int, "torch.Tensor"]]


@dataclass(frozen=True)
class LayerSeparation:
    """One layer's figures.

    accuracy: share of held-out pairs whose positive text projects higher than their negative one; an
    equal projection is a miss. interval: its 95 % bootstrap interval over pairs. threshold_accuracy:
    share of held-out texts on their side of the threshold, which lies midway between the two means of
    the other pairs. stability: cosine between the directions of two halves of the pairs. neighbour:
    cosine to the direction of the next layer. relative_norm: ‖mean difference‖ / μ, the mean norm of
    the activations that were read. None where there is nothing to compare.
    """

    layer: int
    accuracy: float
    interval: tuple[float, float]
    threshold_accuracy: float
    stability: float | None
    neighbour: float | None
    relative_norm: float

    @property
    def separates(self) -> bool:
        """Tell whether the layer does better than chance: its interval lies above one half."""
        return self.interval[0] > CHANCE


@dataclass(frozen=True)
class Separation:
    """How well a direction tells pairs apart that it was not found from.

    folds: 0 where held-out pairs were given, else how many folds the pairs were divided into.
    """

    pairs: int
    folds: int
    seed: int
    layers: tuple[LayerSeparation, ...]

    @property
    def best(self) -> LayerSeparation:
        """The layer with the highest accuracy; of equals the one with the better threshold accuracy."""
        return max(self.layers, key=lambda entry: (entry.accuracy, entry.threshold_accuracy))

    @property
    def warning(self) -> str | None:
        """Say in which layers the direction does no better than chance; None where there is none."""
        failed = [entry.layer for entry in self.layers if not entry.separates]
        if not failed:
            return None
        best = self.best
        if len(failed) == len(self.layers):
            low, high = best.interval
            return (
                f"the direction does not separate {self.pairs} held-out pairs in any layer (at best "
                f"{best.accuracy:.0%} in layer {best.layer}, interval {low:.0%} to {high:.0%}): check "
                "the pairs, give more of them, or take another --method or --token"
            )
        return (
            f"the direction does not separate {self.pairs} held-out pairs in layers "
            f"{', '.join(map(str, failed))}; it does best in layer {best.layer} ({best.accuracy:.0%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for files and `--json`."""
        values = asdict(self)
        values["layers"] = [
            {**entry, "interval": list(entry["interval"])} for entry in values["layers"]
        ]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Separation:
        """Read what `to_dict` wrote; raise DirectionError where it is something else."""
        try:
            layers = tuple(_read_layer(entry) for entry in values["layers"])
            pairs, folds, seed = (int(values[key]) for key in ("pairs", "folds", "seed"))
            return Separation(pairs, folds, seed, layers)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DirectionError(f"the separation is not what bake writes: {error!r}") from None


def _read_layer(entry: Mapping[str, Any]) -> LayerSeparation:
    """Read one layer's figures, each of which is a number or, where it may be, absent."""
    low, high = entry["interval"]
    stability, neighbour = (
        None if entry[key] is None else float(entry[key]) for key in ("stability", "neighbour")
    )
    return LayerSeparation(
        layer=int(entry["layer"]),
        accuracy=float(entry["accuracy"]),
        interval=(float(low), float(high)),
        threshold_accuracy=float(entry["threshold_accuracy"]),
        stability=stability,
        neighbour=neighbour,
        relative_norm=float(entry["relative_norm"]),
    )


def read_separation(direction: Direction) -> Separation | None:
    """Return what a direction's metadata says of its separation; None where it says nothing."""
    return parse_separation(direction.metadata)


def parse_separation(metadata: Mapping[str, str]) -> Separation | None:
    """Return what metadata says of a direction's separation; None where it says nothing."""
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        values = parse_json(text, "it", error=DirectionError)
    except DirectionError as error:
        raise DirectionError(f"the separation is not what bake writes: {error}") from None
    return Separation.from_dict(values)


def encode_separation(separation: Separation) -> str:
    """Return the metadata string; figures are rounded, so that the last bit of a sum is not in it."""
    return json.dumps(rounded(separation.to_dict()), separators=(",", ":"))


def rounded(value: Any) -> Any:
    """Return plain values with their figures rounded to four places."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


def measure_separation(
    read: PairActivations,
    vectors: Mapping[int, torch.Tensor],
    *,
    fit: Fit | None = None,
    held_out: PairActivations | None = None,
    seed: int = 0,
) -> Separation | None:
    """Measure how well directions {layer: (hidden_size,)} found from `read` tell other pairs apart.

    fit: how they were found; without it there are no folds and no stability. Returns None where there
    are neither held-out pairs nor enough pairs to divide. Pairs of the same texts are never divided.
    """
    enough = len(read.groups) >= LEAST_PAIRS
    if held_out is not None:
        scores = _score(read, held_out, vectors)
        pairs, folds = held_out.count, 0
    elif fit is not None and enough:
        pairs, folds = read.count, min(FOLDS, len(read.groups))
        scores = _score_folds(read, fit, folds, seed)
    else:
        return None
    halves = _halves(read, fit, seed) if fit is not None and enough else None
    layers = []
    for layer, following in zip(read.layers, [*read.layers[1:], None], strict=True):
        ordered, sides = scores[layer]
        layers.append(
            LayerSeparation(
                layer=layer,
                accuracy=float(ordered.float().mean()),
                interval=_interval(ordered, seed),
                threshold_accuracy=float(sides.float().mean()),
                stability=_cosine(halves[0][layer], halves[1][layer]) if halves else None,
                neighbour=None
                if following is None
                else _cosine(vectors[layer], vectors[following]),
                relative_norm=float(
                    read.differences(layer).mean(dim=0).norm() / read.norms[layer].double().mean()
                ),
            )
        )
    return Separation(pairs, folds, seed, tuple(layers))


def _score(
    read: PairActivations, held_out: PairActivations, vectors: Mapping[int, torch.Tensor]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return {layer: (pairs,) whether ordered rightly, (pairs, 2) whether each text is on its side}."""
    import torch

    found = {}
    for layer in read.layers:
        unit = vectors[layer].double()
        high, low = (
            held_out.positive[layer].double() @ unit,
            held_out.negative[layer].double() @ unit,
        )
        threshold = (
            sum((side[layer].double() @ unit).mean() for side in (read.positive, read.negative)) / 2
        )
        found[layer] = (high > low, torch.stack([high > threshold, low < threshold], dim=1))
    return found


def _score_folds(
    read: PairActivations, fit: Fit, folds: int, seed: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    import torch

    parts = _divide(read, folds, seed)
    ordered = {layer: torch.zeros(read.count, dtype=torch.bool) for layer in read.layers}
    sides = {layer: torch.zeros(read.count, 2, dtype=torch.bool) for layer in read.layers}
    for fold, held in enumerate(parts):
        others = read.select([i for part in parts[:fold] + parts[fold + 1 :] for i in part])
        try:
            vectors = fit(others)
        except DirectionError:
            continue  # No direction can be found without these pairs: none of them is told apart.
        for layer, (right, side) in _score(others, read.select(held), vectors).items():
            ordered[layer][held] = right
            sides[layer][held] = side
    return {layer: (ordered[layer], sides[layer]) for layer in read.layers}


def _halves(
    read: PairActivations, fit: Fit, seed: int
) -> tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]] | None:
    one, other = _divide(read, 2, seed)
    try:
        return fit(read.select(one)), fit(read.select(other))
    except DirectionError:
        return None


def _divide(read: PairActivations, parts: int, seed: int) -> list[list[int]]:
    """Deal the pairs out at random; those of the same texts stay together."""
    import numpy as np

    groups = read.groups
    order = [groups[int(place)] for place in np.random.default_rng(seed).permutation(len(groups))]
    return [[index for group in order[part::parts] for index in group] for part in range(parts)]


def _interval(ordered: torch.Tensor, seed: int) -> tuple[float, float]:
    values = ordered.double().numpy()
    return bootstrap_interval(lambda chosen: float(values[chosen].mean()), len(values), seed=seed)


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    import torch

    return float(torch.cosine_similarity(first.double(), second.double(), dim=0))
