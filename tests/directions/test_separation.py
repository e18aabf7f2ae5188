"""Separation: planted directions are recognised, noise is not, and the figures are what they say."""

import json
import math
from dataclasses import replace

import pytest
import torch
from test_fit import made_up

from bake.directions.activations import PairActivations
from bake.directions.direction import Direction
from bake.directions.fit import fit_directions
from bake.directions.separation import (
    KEY,
    Separation,
    encode_separation,
    measure_separation,
    read_separation,
)
from bake.errors import DirectionError

WIDTH = 16


def fit(read):
    return fit_directions(read, "mean")


def planted(strength, count=60, seed=0, width=WIDTH):
    """Pairs of noise, with the first axis carrying what tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, count, width, generator=generator)
    axis = torch.eye(width)[0] * strength / 2
    return made_up(positive + axis, negative - axis)


def test_a_planted_direction_separates_by_folds_and_on_held_out_pairs():
    read = planted(8.0)
    for held_out in (None, planted(8.0, count=30, seed=1)):
        found = measure_separation(read, fit(read), fit=fit, held_out=held_out)
        (layer,) = found.layers
        assert layer.accuracy == layer.threshold_accuracy == 1
        assert layer.interval == (1, 1)
        assert layer.stability > 0.9
        assert found.warning is None
        assert (found.pairs, found.folds) == ((60, 5) if held_out is None else (30, 0))


def test_noise_does_not_separate_although_its_direction_fits_its_own_pairs():
    read = planted(0.0, width=64)
    unit = fit(read)[0].double()
    assert float((read.differences(0) @ unit > 0).double().mean()) > 0.8
    found = measure_separation(read, fit(read), fit=fit)
    (layer,) = found.layers
    assert layer.interval[0] <= 0.5 < 0.75 > layer.accuracy
    assert not layer.separates
    assert abs(layer.stability) < 0.6
    assert "does not separate 60 held-out pairs in any layer (at best" in found.warning


def test_figures_by_hand():
    positive = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    negative = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    read = made_up([[3.0, 4.0], [3.0, -4.0]], [[-3.0, 4.0], [-3.0, -4.0]])
    found = measure_separation(
        read, {0: torch.tensor([1.0, 0.0])}, held_out=made_up(positive, negative)
    )
    (layer,) = found.layers
    assert layer.accuracy == 0.5  # The second is the wrong way round, the fourth a draw: a miss.
    assert layer.threshold_accuracy == 3 / 8  # Threshold 0: 2, 1 and 3 lie above it, none below.
    assert layer.relative_norm == pytest.approx(6 / 5)
    assert layer.stability is None
    assert layer.neighbour is None


def test_neighbouring_layers_are_compared():
    one, other = planted(8.0), planted(8.0, seed=3)
    read = PairActivations(
        {2: one.positive[0], 5: other.positive[0].flip(1)},
        {2: one.negative[0], 5: other.negative[0].flip(1)},
        {2: one.norms[0], 5: other.norms[0]},
    )
    first, second = measure_separation(read, fit(read), fit=fit).layers
    assert (first.layer, second.layer) == (2, 5)
    assert abs(first.neighbour) < 0.3  # The axis is the first in one layer, the last in the other.
    assert second.neighbour is None


def test_one_layer_of_several_is_named():
    good, bad = planted(8.0), planted(0.0)
    read = PairActivations(
        {0: bad.positive[0], 1: good.positive[0]},
        {0: bad.negative[0], 1: good.negative[0]},
        {0: bad.norms[0], 1: good.norms[0]},
    )
    found = measure_separation(read, fit(read), fit=fit)
    assert found.best.layer == 1
    assert "60 held-out pairs in layers 0; it does best in layer 1 (100%)" in found.warning


def test_same_seed_same_figures_other_seed_other_folds():
    read = planted(1.0)
    first = measure_separation(read, fit(read), fit=fit, seed=1)
    assert first == measure_separation(read, fit(read), fit=fit, seed=1)
    assert first != measure_separation(read, fit(read), fit=fit, seed=2)


def test_too_few_pairs_say_nothing():
    read = planted(8.0, count=3)
    assert measure_separation(read, fit(read), fit=fit) is None
    assert measure_separation(read, fit(read), fit=fit, held_out=read).layers[0].stability is None


def test_pairs_of_the_same_texts_never_stand_on_both_sides_of_a_split():
    """Noise in a wide space: whoever has seen a pair tells it apart, and nobody else does."""
    once = planted(0.0, count=20, width=256)
    rows = [*range(20)] * 4
    repeated = once.select(rows)
    seen = measure_separation(repeated, fit(repeated), fit=fit).layers[0]
    assert seen.threshold_accuracy > 0.9
    known = replace(repeated, alike=tuple(rows))
    fair = measure_separation(known, fit(known), fit=fit).layers[0]
    assert fair.threshold_accuracy < 0.7
    assert abs(fair.stability) < 0.3 < seen.stability
    assert measure_separation(known.select([0, 20, 40, 60]), fit(known), fit=fit) is None


def test_folds_without_a_direction_separate_nothing():
    """All difference is in one pair: without it there is no direction, and zero is not a success."""
    positive = torch.zeros(4, 2)
    positive[0, 0] = 1.0
    read = made_up(positive + 1, torch.ones(4, 2))
    (layer,) = measure_separation(read, fit(read), fit=fit).layers
    assert layer.accuracy == 0
    assert layer.stability is None


def test_separation_survives_a_direction_file():
    read = planted(1.0)
    found = measure_separation(read, fit(read), fit=fit)
    assert Separation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    direction = Direction(fit(read), "mlp_out", {KEY: encode_separation(found)})
    stored = read_separation(direction)
    assert stored.layers[0].accuracy == pytest.approx(found.layers[0].accuracy, abs=1e-4)
    assert not math.isnan(stored.layers[0].interval[0])
    assert read_separation(Direction(fit(read), "mlp_out")) is None
    damaged = found.to_dict()
    damaged["layers"][0]["interval"] = [None, "0"]
    for text in ("{", '{"pairs": 3}', json.dumps(damaged), json.dumps({**damaged, "pairs": []})):
        with pytest.raises(DirectionError, match="not what bake writes"):
            read_separation(Direction(fit(read), "mlp_out", {KEY: text}))
