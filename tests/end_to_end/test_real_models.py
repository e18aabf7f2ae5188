"""What bake does to two trained models: `make test-real` makes them and runs this.

BAKE_REAL_MODELS names the folder that they lie in, if it is another than build/real-models.
"""

import json
import os
from pathlib import Path

import pytest

from bake import api
from bake.cli.main import main
from bake.lifecycle.verify import verify

pytestmark = pytest.mark.real
FOLDER = Path(os.environ.get("BAKE_REAL_MODELS", "build/real-models"))
AXES = ("formal-casual", "concise-wordy", "confident-hedging", "first-third-person")


@pytest.fixture(params=["smollm2", "gemma3"])
def model(request):
    """One of the two, which have to be there."""
    return find(request.param)


def find(name):
    directory = FOLDER / name
    assert (directory / "config.json").is_file(), "make test-real makes the models first"
    return str(directory)


@pytest.mark.parametrize("axis", AXES)
def test_pairs_alone_give_a_strength_that_works(model, axis, tmp_path):
    made = api.export(model, pairs=axis, output=tmp_path / "out")
    assert made.equivalence.cost.kl_p95 <= 1  # On texts that nothing was chosen on.
    assert not any("comes apart" in line for line in made.equivalence.warnings)
    choice = made.decision.choice
    point = next(each for each in choice.points if each["multiplier"] == choice.multiplier)
    assert point["shift"] > 0.05
    record = json.loads((tmp_path / "out" / "bake.json").read_text())
    assert record["multiplier_choice"]["multiplier"] == made.push.multiplier
    assert any(sample.base != sample.baked for sample in made.equivalence.samples)
    assert verify(tmp_path / "out", model).equivalence.passed


def test_the_other_direction_is_the_other_direction(tmp_path):
    model = find("smollm2")
    made = api.export(model, pairs="formal-casual", multiplier="-auto", output=tmp_path / "out")
    assert made.push.multiplier < 0
    shifts = [each["shift"] for each in made.decision.choice.points if each["shift"] is not None]
    assert shifts
    assert max(shifts) < 0


def test_m_1_is_too_much_for_smollm2_and_one_line_says_so(tmp_path, capsys):
    model, output = find("smollm2"), tmp_path / "out"
    assert main(["export", model, "--pairs", "formal-casual", "-m", "1", "-o", str(output)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "moves neutral text" in line]
    assert len(lines) == 1
    assert "-m auto" in lines[0]


def test_a_direction_is_found_where_export_pushes_on_gemma(tmp_path, capsys):
    model, direction = find("gemma3"), tmp_path / "d.safetensors"
    options = ["--pairs", "formal-casual", "--site", "auto", "-o", str(direction)]
    assert main(["direction", model, *options]) == 0
    told = capsys.readouterr().err
    assert "site attn_in, which bake export takes on this model" in told
    assert "left out: layers 0, in which the texts do not differ" in told
    output = tmp_path / "out"
    options = ["--direction", str(direction), "-m", "2", "-o", str(output)]
    assert main(["export", model, *options]) == 0


def test_a_recipe_of_tune_moves_more_than_the_default(tmp_path):
    found = api.tune(
        find("smollm2"),
        pairs="confident-hedging",
        output=tmp_path / "tuned",
        sites=("mlp_out",),
        methods=("mean",),
        laws=("inverse-sqrt-d",),
    )
    default = next(
        each for each in found.ranking.finalists if each.candidate == found.ranking.default
    )
    assert default.point.net_shift.low > 0
    assert found.best.moved >= default.moved
    assert (
        main(
            [
                "export",
                "--recipe",
                str(tmp_path / "tuned" / "recipe.yaml"),
                "-o",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
