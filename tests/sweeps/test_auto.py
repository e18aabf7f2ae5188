"""`--multiplier auto`: the multiplier that costs what it may, and the reason beside it."""

import json
import math
from itertools import pairwise

import pytest

from bake.anatomy.base import load_base, open_base
from bake.cli.main import COMMANDS, main
from bake.cli.parser import parse
from bake.directions.direction import Direction, normalise
from bake.directions.direction_file import load_direction
from bake.errors import BakeError
from bake.io.shipped import DEMO_DIRECTION, DEMO_NAME
from bake.pipeline.decision import read_pairs_and_trial
from bake.pipeline.recipe import Recipe
from bake.strength.coefficients import band_layers, compute_push
from bake.sweeps import auto, cost_curve
from bake.sweeps.auto import BOUNDS, choose_multiplier, read_trial_texts
from bake.sweeps.controls import random_direction
from bake.sweeps.sweep import measure_sites
from bake.sweeps.window import Bounds
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts

HELD_OUT = "toy-cheerful-gloomy.held-out"


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

    def call(share=1.0, held_out=HELD_OUT, length=1.0, chance=None, **options):
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

        texts = read_trial_texts(DEMO_NAME, read_pairs(held_out) if held_out else ())
        return choose_multiplier(loaded, "mlp_out", push_at, texts, **options)

    return call


def points_of(found):
    return {entry["multiplier"]: entry for entry in found.points}


def test_the_choice_costs_what_it_may_and_hardly_less(choose):
    found = choose()
    points = points_of(found)
    assert 0.85 * BOUNDS.kl <= points[found.largest]["neutral_kl_p95"] <= BOUNDS.kl
    assert 0 < found.multiplier <= found.largest
    assert points[found.multiplier]["shift"] > 0.1
    assert points[found.multiplier]["fluency_ratio"] < BOUNDS.fluency


def test_few_strengths_are_tried(choose):
    assert len(choose().points) <= 5


def test_kl_grows_with_the_multiplier(choose):
    """Else the search could not close in on a target."""
    costs = [entry["neutral_kl_p95"] for entry in choose().points]
    assert len(costs) > 1
    assert all(low < high for low, high in pairwise(costs))


def test_the_other_way_is_judged_the_other_way(choose):
    found = choose(sign=-1)
    point = points_of(found)[found.multiplier]
    assert found.multiplier < 0
    assert point["shift"] < 0 < point["net_shift"]


def test_a_smaller_target_chooses_less(choose):
    loose, tight = choose(), choose(bounds=Bounds(fluency=2.5, kl=0.1))
    assert tight.multiplier < 0.7 * loose.multiplier
    assert points_of(tight)[tight.multiplier]["neutral_kl_p95"] <= 0.1


def test_a_target_that_nothing_meets_is_refused_in_one_line(choose):
    with pytest.raises(
        BakeError, match=r"--multiplier auto: no strength stays within .*--target-kl"
    ):
        choose(bounds=Bounds(2.5, 1e-9))


@pytest.mark.parametrize("length", [1 / 16, 16])
def test_a_direction_of_another_length_gets_the_same_push(choose, length):
    """As `--keep-scale` pushes one."""
    plain, found = choose(), choose(length=length)
    assert found.multiplier == pytest.approx(plain.multiplier / length, rel=0.15)
    assert points_of(found)[found.multiplier]["neutral_kl_p95"] <= BOUNDS.kl


def test_a_direction_that_does_nothing_is_refused_with_what_it_did(choose):
    with pytest.raises(BakeError) as caught:
        choose(chance=3)
    text = str(caught.value)
    assert "no significant shift of the 12 held-out pairs within KL 0.7" in text
    assert "try another direction or site, or give --multiplier M" in text


def test_a_part_of_a_direction_shifts_less_at_the_same_cost(choose):
    whole, part = choose(), choose(0.75)
    shifts = [points_of(found)[found.multiplier]["shift"] for found in (whole, part)]
    assert 0 < shifts[1] < 0.85 * shifts[0]


def test_without_held_out_pairs_the_largest_inside_is_taken_and_said(choose):
    found = choose(held_out=None)
    assert found.multiplier == found.largest
    assert {entry["shift"] for entry in found.points} == {None}
    assert "there are no held-out pairs" in found.describe()
    assert "12 held-out pairs" in choose().describe()


def test_text_that_comes_apart_is_given_a_weaker_push(choose, monkeypatch):
    monkeypatch.setattr(auto._Trial, "_wanted_ratio", lambda *_: 0.0)
    plain = choose()
    ratio = points_of(plain)[plain.multiplier]["fluency_ratio"]
    assert ratio > 1.02
    found = choose(bounds=Bounds(fluency=ratio - 0.01, kl=BOUNDS.kl))
    assert found.multiplier < plain.multiplier
    assert points_of(found)[found.multiplier]["fluency_ratio"] < ratio


def test_text_that_comes_apart_at_every_strength_is_refused(choose, monkeypatch):
    monkeypatch.setattr(auto._Trial, "_wanted_ratio", lambda *_: 0.0)
    with pytest.raises(BakeError, match=r"sampled text's perplexity is × .* \(bound 0\.01\)"):
        choose(bounds=Bounds(fluency=0.01, kl=BOUNDS.kl))


@pytest.mark.parametrize(
    ("costs", "target", "expected"),
    [
        ({0.5: 1.0}, 0.25, 0.25),  # as m² from one
        ({0.5: 1.0}, 4.0, 1.0),
        ({0.25: 0.1, 1.0: 1.6}, 0.4, 0.5),  # between two
        ({1.0: 1.0, 2.0: 8.0}, 64.0, 4.0),  # beyond them, as it grew there
        ({1.0: 1.0, 2.0: 8.0}, 1 / 8, 0.5),
        ({1.0: 1.0, 2.0: 1.0}, 2.0, 8.0),  # it does not grow: a step that is not endless
    ],
)
def test_where_the_target_is_reached_is_guessed_from_what_is_known(costs, target, expected):
    assert cost_curve.cross(costs, target) == pytest.approx(expected)


@pytest.mark.parametrize(("size", "short"), [(0.3567, 0.35), (12.9, 12.0), (1.0, 1.0), (0.1, 0.1)])
def test_multipliers_have_two_digits_and_are_rounded_down(size, short):
    assert cost_curve.shorten(size) == short


def test_a_divergence_that_is_no_number_costs_more_than_anything():
    assert cost_curve.cost_of([[0.1, 0.2], [0.3]]) == pytest.approx(0.29)
    for broken in (math.nan, math.inf):
        assert cost_curve.cost_of([[0.1, broken], [broken]]) > 1000


class TestPairsAtHand:
    """What auto is judged on, and where it is the default."""

    def read(self, **options):
        return read_pairs_and_trial(Recipe("m", "o", **options))

    def test_a_set_has_its_held_out_pairs_beside_it(self):
        pairs, texts = self.read(pairs="formal-casual")
        assert len(pairs) == len(read_pairs("formal-casual"))
        assert texts.pairs == tuple(read_pairs("formal-casual.held-out")[:12])

    def test_so_has_a_file(self, tmp_path):
        for name in ("mine", "mine.held-out"):
            rows = [{"prompt": name, "positive": f" a{n}", "negative": f" b{n}"} for n in range(3)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text)
        pairs, texts = self.read(pairs=str(tmp_path / "mine.jsonl"))
        assert (len(pairs), len(texts.pairs)) == (3, 3)
        assert texts.pairs[0].prompt == "mine.held-out"

    def write(self, folder, count):
        rows = [{"prompt": f"{n}", "positive": " a", "negative": " b"} for n in range(count)]
        path = folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def test_else_every_fourth_pair_is_kept_out_of_the_direction(self, tmp_path, capsys):
        pairs, texts = self.read(pairs=self.write(tmp_path, 20))
        assert len(pairs) == 15
        assert [pair.prompt for pair in texts.pairs] == ["3", "7", "11", "15", "19"]
        assert "5 of the pairs are kept out of the direction" in capsys.readouterr().err

    def test_of_few_pairs_none_is_kept_out_and_m_is_1(self, tmp_path):
        pairs, texts = self.read(pairs=self.write(tmp_path, 15))
        assert len(pairs) == 15
        assert texts is None

    def test_a_number_uses_all_pairs(self, tmp_path):
        pairs, texts = self.read(pairs=self.write(tmp_path, 20), multiplier=0.5)
        assert len(pairs) == 20
        assert texts is None

    def test_a_bare_direction_is_pushed_at_1(self):
        assert self.read(direction="d.safetensors") == ([], None)
        assert self.read(direction=DEMO_NAME) == ([], None)

    def test_a_direction_with_held_out_pairs_is_not(self):
        _, texts = self.read(direction="d.safetensors", held_out="formal-casual.held-out")
        assert len(texts.pairs) == 12

    @pytest.mark.parametrize("options", [{"multiplier": "auto"}, {"target_kl": 0.3}])
    def test_auto_needs_no_pairs(self, options):
        _, texts = self.read(direction="d.safetensors", **options)
        assert texts.pairs == ()
        assert texts.neutral

    def test_what_ships_has_its_own_held_out_pairs(self):
        recipe = Recipe("m", "o", direction=DEMO_NAME, multiplier="auto")
        _, texts = read_pairs_and_trial(recipe)
        assert texts.pairs == tuple(read_pairs(HELD_OUT)[:12])
        assert texts.neutral[0] == read_prompts("toy-neutral")[0]


def test_an_export_uses_it_and_records_why(tmp_path, capsys):
    norms, output = tmp_path / "norms.json", tmp_path / "out"
    assert main(["calibrate", "bake-demo", "-o", str(norms)]) == 0
    capsys.readouterr()
    # Saved norms need no model, a choice does: it is loaded for it.
    options = ("--direction", "bake-demo", "--calibration", str(norms), "-m", "-auto")
    more = ("--target-kl", "0.2", "-o", str(output), "--json")
    assert main(["export", "bake-demo", *options, *more]) == 0
    printed = capsys.readouterr()
    result = json.loads((output / "bake.json").read_text())
    choice = result["multiplier_choice"]
    assert json.loads(printed.out)["multiplier_choice"] == choice
    assert result["multiplier"] == choice["multiplier"] < 0
    assert choice["reason"] in printed.err
    assert choice["bounds"] == {"fluency": 2.5, "kl": 0.2}
    assert choice["reason"] in (output / "README.md").read_text()


def test_pairs_alone_choose_the_strength(tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", "bake-demo", "--pairs", "toy-cheerful-gloomy", "-o", str(output)]) == 0
    result = json.loads((output / "bake.json").read_text())
    assert result["multiplier_choice"]["pairs"] == 12
    assert f"m = {result['multiplier']:g} shifts 12 held-out pairs" in capsys.readouterr().err
    assert result["equivalence"]["cost"]["kl_p95"] <= 1


class TestRefused:
    """Options that contradict each other, before any work starts."""

    def check(self, **options):
        with pytest.raises(BakeError) as caught:
            Recipe("m", "o", direction="d", **options).check()
        return str(caught.value)

    @pytest.mark.parametrize(
        "options", [{"multiplier": "auto"}, {"target_kl": 0.5}, {"held_out": "pairs.jsonl"}]
    )
    def test_thin(self, options):
        found = self.check(thin=True, calibration="norms.json", **options)
        assert found.startswith("--thin cannot go with --multiplier auto")

    def test_held_out_with_a_number(self):
        found = self.check(held_out="pairs.jsonl", multiplier=1.0)
        assert "go with --pairs, with --multiplier auto" in found

    def test_a_target_with_a_number(self):
        assert "--target-kl is for --multiplier auto" in self.check(target_kl=0.5, multiplier=1.0)

    @pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
    def test_a_target_that_is_none(self, target):
        assert "nats above 0, such as 0.5" in self.check(target_kl=target)

    def test_another_word(self):
        assert "'most' is neither a number nor auto" in self.check(multiplier="most")

    def test_the_command_line_takes_auto_and_numbers_only(self):
        with pytest.raises(SystemExit) as caught:
            main(["export", "m", "-o", "o", "-m", "most"])
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["-m", "-auto"], "-auto"),
        (["--multiplier", "-auto"], "-auto"),
        (["--multiplier=-auto"], "-auto"),
        (["-m", "auto"], "auto"),
        (["-m", "-1.5"], -1.5),
    ],
)
def test_the_command_line_reads_either_way(words, value):
    commands = {command.name: command for command, _ in COMMANDS}
    _, parsed = parse(commands, ["export", "m", *words, "--json"])
    assert parsed.multiplier == value
    assert parsed.json is True


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
