"""The measured law: derivatives that are what a small push does, and the best coefficients for them."""

import json

import numpy as np
import pytest

from bake.anatomy.base import load_base, open_base
from bake.cli.main import main
from bake.directions.direction_file import load_direction
from bake.errors import BakeError
from bake.io.shipped import DEMO_DIRECTION, DEMO_NAME
from bake.strength.coefficients import band_layers, compute_push
from bake.sweeps.arms import Arm
from bake.sweeps.measured_law import Derivatives, follow_measured_law, measure_derivatives
from bake.sweeps.measurements import Texts, measure_neutral, measure_pairs
from bake.sweeps.summary import pair_gaps
from bake.sweeps.sweep import measure_sites
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts

HELD_OUT = "toy-cheerful-gloomy.held-out"


@pytest.fixture(scope="module")
def toy():
    """The shipped model with its direction: (loaded, push at m = 1, texts)."""
    base = open_base(DEMO_NAME)
    loaded, layers = load_base(base), band_layers(base.anatomy.layer_count)
    norms = measure_sites(loaded, {"mlp_out": layers}, read_prompts("neutral")[:6])["mlp_out"]
    direction = load_direction(DEMO_DIRECTION).select(layers, loaded.hidden_size)
    push = compute_push(norms, direction, hidden_size=loaded.hidden_size)
    neutral = [text[:120] for text in read_prompts("toy-neutral")[:4]]
    return loaded, push, Texts(tuple(read_pairs(HELD_OUT)[:6]), tuple(neutral), ())


@pytest.fixture(scope="module")
def derivatives(toy):
    loaded, push, texts = toy
    return measure_derivatives(loaded, "mlp_out", push, texts)


def run(toy, size, units=None):
    """Push `units` of each layer, × size; return (mean shift of the pairs, mean KL on neutral text)."""
    loaded, push, texts = toy
    units = units or dict.fromkeys(push.vectors, 1.0)
    vectors = {layer: vector * units[layer] * size for layer, vector in push.vectors.items()}
    arms = [Arm("base", "base"), Arm("push", "direction", 1.0, "mlp_out", push=vectors)]
    pairs = measure_pairs(loaded, arms, texts.pairs)
    neutral = measure_neutral(loaded, arms, texts.neutral)
    shift = (pair_gaps(pairs["push"]) - pair_gaps(pairs["base"])).mean()
    return float(shift), float(np.concatenate(neutral["push"]["kl"]).mean())


def test_the_derivatives_are_what_a_small_push_does(toy, derivatives):
    size = 0.05
    shift, cost = run(toy, size)
    ones = np.ones(len(derivatives.layers))
    assert shift > 0.005  # It does something.
    assert shift == pytest.approx(size * float(derivatives.shift.sum()), rel=0.1)
    assert cost == pytest.approx(0.5 * size**2 * float(ones @ derivatives.fisher @ ones), rel=0.15)


def test_the_fisher_matrix_is_one(derivatives):
    assert np.allclose(derivatives.fisher, derivatives.fisher.T)
    assert np.linalg.eigvalsh(derivatives.fisher).min() > 0


def test_the_solution_costs_what_the_other_law_does_and_shifts_more(toy, derivatives):
    units, ones = derivatives.solve(), np.ones(len(derivatives.layers))
    found = np.array([units[layer] for layer in derivatives.layers])
    assert (found >= 0).all()
    assert found @ derivatives.fisher @ found == pytest.approx(ones @ derivatives.fisher @ ones)
    assert found @ derivatives.shift > 1.02 * derivatives.shift.sum()
    # And so it is on the model, not only on the derivatives.
    (other, spent), (shift, cost) = run(toy, 0.1), run(toy, 0.1, units)
    assert cost == pytest.approx(spent, rel=0.15)
    assert shift > 1.02 * other


@pytest.mark.parametrize(
    ("shift", "expected"),
    [([1.0, 1.0], [1, 1]), ([2.0, 1.0], [2, 1]), ([1.0, -1.0], [2**0.5, 0])],
)
def test_layers_that_have_nothing_to_do_with_each_other_share_by_what_they_give(shift, expected):
    units = Derivatives((3, 4), np.array(shift), np.eye(2)).solve()
    assert units[4] / units[3] == pytest.approx(expected[1] / expected[0])
    assert units[3] ** 2 + units[4] ** 2 == pytest.approx(2)


def test_a_cheaper_layer_is_pushed_further():
    units = Derivatives((3, 4), np.array([1.0, 1.0]), np.diag([1.0, 4.0])).solve()
    assert units[3] == pytest.approx(4 * units[4])


def test_a_layer_that_costs_nothing_that_is_seen_breaks_nothing():
    units = Derivatives((3, 4), np.array([1.0, 0.0]), np.diag([1.0, 0.0])).solve()
    assert units[3] > 0
    assert units[4] == 0


@pytest.mark.parametrize("fisher", [np.zeros((2, 2)), np.full((2, 2), np.nan)])
def test_what_cannot_be_measured_is_one_line(fisher):
    with pytest.raises(BakeError, match="gives no finite effect to measure"):
        Derivatives((3, 4), np.array([1.0, 1.0]), fisher).solve()


def test_where_no_layer_shifts_anything_it_says_so():
    with pytest.raises(BakeError, match="in no layer does a small push shift"):
        Derivatives((3, 4), np.array([-1.0, 0.0]), np.eye(2)).solve()


def test_the_push_keeps_its_directions_and_scales_with_m(toy):
    loaded, push, texts = toy
    measured = follow_measured_law(loaded, "mlp_out", push, texts)
    assert measured.law == "measured"
    assert [entry.layer for entry in measured.layers] == [entry.layer for entry in push.layers]
    assert measured.vectors.keys() == push.vectors.keys()
    double = measured.at(2.0)
    for one, two in zip(measured.layers, double.layers, strict=True):
        assert two.coefficient == pytest.approx(2 * one.coefficient)


def test_an_export_by_it_records_the_coefficients_and_is_reproduced(tmp_path, capsys):
    output = tmp_path / "out"
    options = ("--direction", "bake-demo", "--held-out", HELD_OUT, "--law", "measured", "-m", "0.5")
    assert main(["export", "bake-demo", *options, "-o", str(output)]) == 0
    record = json.loads((output / "bake.json").read_text())
    given = record["given_coefficients"]
    assert record["law"] == "measured"
    assert min(given.values()) >= 0 < max(given.values())
    for entry in record["layers"]:
        assert entry["coefficient"] == pytest.approx(0.5 * given[str(entry["layer"])])
    assert "shift held-out pairs most" in (output / "README.md").read_text()
    assert main(["reproduce", str(output)]) == 0
    assert main(["rescale", str(output), "--multiplier", "0.25"]) == 0
    rescaled = json.loads((output / "bake.json").read_text())
    assert rescaled["layers"][0]["coefficient"] == pytest.approx(
        0.5 * record["layers"][0]["coefficient"]
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--direction", "d.safetensors"], "is measured on held-out contrast pairs"),
        (["--direction", "d.safetensors", "--thin", "--calibration", "c"], "--law measured"),
        (["--direction", "d.safetensors", "--coefficients", "3=1"], "--law has no effect"),
    ],
)
def test_what_it_needs_is_said(options, said, tmp_path, capsys):
    direction = tmp_path / "d.safetensors"
    direction.write_bytes(DEMO_DIRECTION.read_bytes())
    words = [str(direction) if word == "d.safetensors" else word for word in options]
    more = ["-m", "1", "--law", "measured", "-o", str(tmp_path / "out")]
    assert main(["export", "bake-demo", *words, *more]) == 1
    assert said in capsys.readouterr().err
