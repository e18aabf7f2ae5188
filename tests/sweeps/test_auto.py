"""`--multiplier auto`: a multiplier inside the window, and the reason beside it."""

import json

import pytest

from bake.anatomy.base import load_base, open_base
from bake.cli.main import main
from bake.directions.direction import Direction, normalise
from bake.directions.direction_file import load_direction
from bake.errors import BakeError
from bake.io.shipped import DEMO_DIRECTION, DEMO_NAME
from bake.pipeline.recipe import Recipe
from bake.strength.coefficients import band_layers, compute_push
from bake.sweeps import auto as strength
from bake.sweeps.auto import AUTO_MULTIPLIERS, choose_multiplier, read_trial_texts
from bake.sweeps.controls import random_direction
from bake.sweeps.sweep import measure_sites
from bake.sweeps.window import Bounds
from bake.texts.prompts import read_prompts


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """Few texts, so that a choice takes seconds."""
    for name, count in (("OPENINGS", 8), ("NEUTRAL", 6), ("PAIRS", 8)):
        monkeypatch.setattr(strength, name, count)
    monkeypatch.setattr(strength, "AUTO_MULTIPLIERS", (0.5, 1.0, 2.0, 4.0))


@pytest.fixture(scope="module")
def demo():
    """The shipped model, loaded once: (loaded, norms, layers)."""
    base = open_base(DEMO_NAME)
    loaded, layer_count = load_base(base), base.anatomy.layer_count
    norms = measure_sites(
        loaded,
        {"mlp_out": range(layer_count)},
        read_prompts("neutral")[:6],
    )
    return loaded, norms["mlp_out"], band_layers(layer_count)


def mix(direction, share, layers, hidden_size):
    """Unit vectors of which only `share` is the direction; the rest is orthogonal and means nothing."""
    chance = random_direction(direction, layers, hidden_size, seed=0)
    rest = (1 - share**2) ** 0.5
    return Direction(
        {
            layer: normalise(share * direction.layer(layer) + rest * chance.layer(layer), "mixed")
            for layer in layers
        },
        "mlp_out",
    )


@pytest.fixture
def choose(demo):
    """Return a function: how much of the direction, options → MultiplierChoice."""
    loaded, norms, layers = demo

    def call(share=1.0, held_out="cheerful-gloomy.held-out", length=1.0, chance=None, **options):
        direction = load_direction(DEMO_DIRECTION)
        if chance is not None:
            direction = random_direction(direction, layers, loaded.hidden_size, chance)
        if share < 1:
            direction = mix(direction, share, layers, loaded.hidden_size)

        def push_at(multiplier):
            return compute_push(
                {layer: norms[layer] for layer in layers},
                direction.select(layers, loaded.hidden_size),
                hidden_size=loaded.hidden_size,
                multiplier=length * multiplier,
            )

        texts = read_trial_texts(None, held_out)
        return choose_multiplier(loaded, "mlp_out", push_at, texts, **options)

    return call


def inside(entry, bounds):
    return entry["fluency_ratio"] <= bounds.fluency and entry["neutral_kl_p95"] <= bounds.kl


def test_two_directions_of_different_strength_both_get_one_inside_the_window(choose):
    strong, weak = choose(1.0), choose(0.5)
    at_one = [
        next(entry["shift"] for entry in found.points if entry["multiplier"] == 1.0)
        for found in (strong, weak)
    ]
    assert at_one[1] < 0.8 * at_one[0]  # The effects do differ.
    for found in (strong, weak):
        points = {entry["multiplier"]: entry for entry in found.points}
        assert inside(points[found.multiplier], found.bounds)
        assert not inside(points[4.0], found.bounds)
        assert found.multiplier <= found.largest < 4
        best = max(e["shift"] for m, e in points.items() if m <= found.largest)
        assert points[found.multiplier]["shift"] == best


def test_tighter_bounds_choose_less(choose):
    loose, tight = choose(), choose(bounds=Bounds(1.5, 0.2))
    assert tight.multiplier < loose.multiplier
    assert "95th percentile KL" in tight.ended_by


def test_nothing_inside_is_refused_in_one_line(choose):
    with pytest.raises(BakeError, match=r"--multiplier auto: no strength stays within the bounds"):
        choose(bounds=Bounds(1.5, 1e-9))


@pytest.mark.parametrize("length", [1 / 16, 16])
def test_a_direction_of_another_length_is_followed_beyond_the_grid(choose, length):
    """As `--keep-scale` pushes one: the same window, at other multipliers."""
    plain, found = choose(), choose(length=length)
    tried = sorted(entry["multiplier"] for entry in found.points)
    assert [entry["multiplier"] for entry in found.points] == tried
    assert found.multiplier == pytest.approx(plain.multiplier / length, rel=0.6)
    assert inside({e["multiplier"]: e for e in found.points}[found.multiplier], found.bounds)
    assert found.largest < tried[-1]


def test_a_direction_that_does_nothing_is_refused_with_what_it_did(choose):
    with pytest.raises(BakeError) as caught:
        choose(chance=3)
    text = str(caught.value)
    assert "no significant shift of the 8 held-out pairs" in text
    assert "try another direction, or give --multiplier M" in text


def test_without_held_out_pairs_the_largest_inside_is_taken_and_said(choose):
    found = choose(held_out=None)
    assert found.multiplier == found.largest
    assert {entry["shift"] for entry in found.points} == {None}
    assert "there are no held-out pairs" in found.describe()
    assert "8 held-out pairs" in choose().describe()


def test_what_ships_has_its_own_held_out_pairs():
    assert len(read_trial_texts("bake-demo", None).pairs) == 8
    assert read_trial_texts("my.safetensors", None).pairs == ()
    assert read_trial_texts("my.safetensors", "formal-casual.held-out").pairs


def test_the_whole_grid_reaches_both_sides_of_one():
    assert min(AUTO_MULTIPLIERS) < 1 < max(AUTO_MULTIPLIERS)
    assert sorted(AUTO_MULTIPLIERS) == list(AUTO_MULTIPLIERS)


def test_an_export_uses_it_and_records_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(strength, "AUTO_MULTIPLIERS", (0.5, 4.0))
    norms, output = tmp_path / "norms.json", tmp_path / "out"
    assert main(["calibrate", "bake-demo", "-o", str(norms)]) == 0
    capsys.readouterr()
    # Saved norms need no model, a choice does: it is loaded for it.
    options = ("--direction", "bake-demo", "--calibration", str(norms), "-m", "auto")
    assert main(["export", "bake-demo", *options, "-o", str(output), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads((output / "bake.json").read_text())
    choice = result["multiplier_choice"]
    assert json.loads(printed.out)["multiplier_choice"] == choice
    assert result["multiplier"] == choice["multiplier"] == 0.5
    assert choice["reason"] in printed.err
    assert choice["bounds"] == {"fluency": 1.5, "kl": 1.0}
    assert [entry["multiplier"] for entry in choice["points"]] == [0.5, 4.0]
    card = (output / "README.md").read_text()
    assert choice["reason"] in card


class TestRefused:
    """Options that contradict each other, before any work starts."""

    def check(self, **options):
        with pytest.raises(BakeError) as caught:
            Recipe("m", "o", direction="d", **options).check()
        return str(caught.value)

    def test_thin(self):
        found = self.check(multiplier="auto", thin=True, calibration="norms.json")
        assert found.startswith("--thin cannot go with --multiplier auto")

    def test_held_out_without_auto(self):
        assert "go with --pairs or with --multiplier auto" in self.check(held_out="pairs.jsonl")

    def test_another_word(self):
        assert "'most' is neither a number nor auto" in self.check(multiplier="most")

    def test_the_command_line_takes_auto_and_numbers_only(self):
        with pytest.raises(SystemExit) as caught:
            main(["export", "m", "-o", "o", "-m", "most"])
        assert caught.value.code == 2


def test_an_estimate_counts_it(capsys):
    options = ("export", "bake-demo", "--direction", "bake-demo", "--estimate", "--json")
    assert main([*options]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*options, "-m", "auto"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = [entry["stage"] for entry in found["passes"]]
    assert "choose the multiplier" in stages
    assert "choose the multiplier" not in [entry["stage"] for entry in plain["passes"]]
    assert found["forwards"] > plain["forwards"]
