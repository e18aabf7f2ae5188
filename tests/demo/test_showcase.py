"""What the shipped direction does to the shipped model, counted on sampled text.

The bounds are promises of the README. They are far enough from what is measured that another
machine's rounding, which changes single samples, does not break them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bake.anatomy.base import load_base, open_base
from bake.cli.main import main
from bake.demo import showcase
from bake.directions.direction_file import load_direction
from bake.io.shipped import DEMO_DIRECTION, DEMO_NAME
from bake.strength.coefficients import band_layers, compute_push
from bake.strength.norms import measure_norms
from bake.texts.prompts import read_prompts


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What `bake demo` shows, with checkpoints that are kept."""
    return showcase.run(tmp_path_factory.mktemp("demo") / "kept")


@pytest.fixture(scope="module")
def measured(shown):
    """{model's name: figures}."""
    return {entry.name: entry for entry in shown.measured}


def test_plus_one_makes_the_text_more_cheerful_and_keeps_it_fluent(measured):
    assert measured["+1"].continuations >= 90
    assert measured["+1"].target_ratio >= 1.6
    assert measured["+1"].target_interval[0] > 1.2
    assert measured["+1"].perplexity_ratio < 1.2


def test_minus_one_makes_it_less_cheerful(measured):
    assert measured["-1"].target_ratio < 0.7
    assert measured["-1"].target_interval[1] < 1
    assert measured["-1"].perplexity_ratio < 1.2


def test_three_is_too_much(measured):
    base = open_base(DEMO_NAME)
    loaded, layers = load_base(base), band_layers(base.anatomy.layer_count)
    norms = measure_norms(loaded, "mlp_out", loaded.batches(read_prompts("neutral")), layers)
    unit = load_direction(DEMO_DIRECTION).select(layers, loaded.hidden_size)
    push = compute_push(
        norms.values(), unit, hidden_size=loaded.hidden_size, multiplier=3.0
    ).vectors
    with loaded.steered("mlp_out", push):
        drawn = showcase.sample({"+3": loaded})
    assert showcase.count(drawn, loaded)["+3"].perplexity() > 5 * measured["base"].perplexity


def test_the_command_shows_it(shown, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(showcase, "run", lambda *given: asked.append(given) or shown)
    assert main(["demo", "--json", "-o", str(shown.output), "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert asked == [(shown.output, True)]
    assert [entry["name"] for entry in result["measured"]] == ["base", "+1", "-1"]
    assert all(entry["equivalence"]["passed"] for entry in result["exports"])
    assert all((shown.output / name / "bake.json").is_file() for name in ("demo+1", "demo-1"))
    assert main(["demo"]) == 0
    text = capsys.readouterr().out
    assert asked[1] == (None, False)
    assert f"> {shown.texts[0][0]}" in text
    assert "cheerful words" in text


@pytest.mark.parametrize(
    ("kept", "summary"), [(Path("kept"), "and how to load it"), (None, "proof")]
)
def test_how_to_load_is_only_said_of_checkpoints_that_are_kept(monkeypatch, kept, summary):
    monkeypatch.setattr(showcase, "describe_export", lambda export: "and how to load it")
    monkeypatch.setattr(showcase, "describe_proven", lambda export: "proof")
    base = showcase.Measured("base", 1, 0.1, 1.0, (1.0, 1.0), 4.0, 1.0, (1.0, 1.0))
    text = showcase.describe(showcase.Showcase((None,), (base,), (), {}, kept))
    assert text.startswith(summary)
    assert ("temporary" in text) == (kept is None)
