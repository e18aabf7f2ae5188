"""Which layer's direction is taken out: the one that moves held-out pairs most, at a cost within bounds."""

import json
from dataclasses import replace

import pytest
import torch

from bake.anatomy.base import load_base, open_base
from bake.api import ablate
from bake.directions.direction_file import load_direction
from bake.errors import BakeError
from bake.hooks import ablated
from bake.io.shipped import DEMO_DIRECTION, DEMO_MODEL
from bake.sweeps.auto import read_trial_texts
from bake.sweeps.layer_choice import BOUNDS, choose_layer
from bake.sweeps.window import Bounds
from bake.texts.pairs import ContrastPair, read_pairs
from bake.writes import Ablation, orthonormalize


@pytest.fixture(scope="module")
def toy():
    base = open_base(str(DEMO_MODEL))
    return load_base(base), base.anatomy.ablation.choose("stream", "llama")


@pytest.fixture(scope="module")
def direction():
    return load_direction(DEMO_DIRECTION)


@pytest.fixture(scope="module")
def texts():
    return read_trial_texts("bake-demo", read_pairs("toy-cheerful-gloomy.held-out"))


def gap(loaded, pair):
    """log p(positive) − log p(negative) per token of a pair, without bake's measuring."""
    found = []
    for text in (pair.positive, pair.negative):
        start = len(loaded.tokenizer(pair.prompt).input_ids)
        ids = loaded.tokenizer(pair.prompt + text).input_ids
        with torch.no_grad():
            logs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        chosen = [float(logs[place - 1, ids[place]]) for place in range(start, len(ids))]
        found.append(sum(chosen) / len(chosen))
    return found[0] - found[1]


def test_it_is_the_layer_that_moves_pairs_most_within_the_bound(toy, direction, texts):
    loaded, writes = toy
    choice = choose_layer(loaded, writes, direction, texts)
    costs = {p["layer"]: p["neutral_kl_p95"] for p in choice.points}
    moved = {p["layer"]: p["net_shift"] for p in choice.points}
    assert costs[choice.layer] <= BOUNDS.kl
    better = [layer for layer in moved if moved[layer] > moved[choice.layer]]
    assert all(costs[layer] > BOUNDS.kl for layer in better)
    assert f"layer {choice.layer}'s direction" in choice.describe()
    assert choice.tried == 8  # of nine layers, the last fifth left out
    unit = orthonormalize([direction.layer(choice.layer)])
    with ablated(loaded.model, writes, Ablation(dict.fromkeys(range(9), unit))):
        own = [gap(loaded, pair) for pair in texts.pairs]
    plain = [gap(loaded, pair) for pair in texts.pairs]
    shift = sum(own) / len(own) - sum(plain) / len(plain)
    assert shift < -0.05
    recorded = next(p["shift"] for p in choice.points if p["layer"] == choice.layer)
    assert recorded == pytest.approx(shift, rel=1e-2)


def test_a_bound_that_none_is_within_is_told(toy, direction, texts):
    loaded, writes = toy
    with pytest.raises(BakeError, match=r"costs more than KL 1e-06 .*--from-layer \d"):
        choose_layer(loaded, writes, direction, texts, bounds=Bounds(kl=1e-6))


def test_pairs_that_nothing_moves_are_told(toy, direction, texts):
    loaded, writes = toy
    same = tuple(
        ContrastPair(p.prompt, *((p.positive, p.negative) if n % 2 else (p.negative, p.positive)))
        for n, p in enumerate(texts.pairs)
    )
    with pytest.raises(BakeError, match=r"moves none of the 12 held-out pairs .*--from-layer L"):
        choose_layer(loaded, writes, direction, replace(texts, pairs=same))


def test_an_ablation_from_pairs_says_why_this_layer(tmp_path):
    result = ablate("bake-demo", pairs="toy-cheerful-gloomy", output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "bake.json").read_text())
    choice = record["layer_choice"]
    assert result.choice.layer == choice["layer"]
    assert record["removed"][0]["metadata"]["layer"] == str(choice["layer"])
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    assert f"Layer {choice['layer']}'s direction, taken out everywhere, shifts" in card
    named = ablate(
        "bake-demo",
        pairs="toy-cheerful-gloomy",
        from_layer=choice["layer"],
        output=tmp_path / "named",
    )
    assert named.choice is None
