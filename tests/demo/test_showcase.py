"""What the shipped direction does to the shipped model, counted on sampled text.

The bounds are promises of the README. They are far enough from what is measured that another
machine's rounding, which changes single samples, does not break them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bake.anatomy.base import load_base, open_base
from bake.demo import showcase
from bake.directions.direction_file import load_direction
from bake.io.shipped import DEMO_DIRECTION, DEMO_NAME
from bake.strength.coefficients import band_layers, compute_push
from bake.strength.norms import measure_norms
from bake.texts.prompts import read_prompts


@pytest.fixture(scope="module")
def measured():
    """{multiplier: figures} of the hooked model on the shipped openings."""
    base = open_base(DEMO_NAME)
    anatomy, loaded = base.anatomy, load_base(base)
    layers = band_layers(anatomy.layer_count)
    batches = loaded.batches(read_prompts("neutral"))
    norms = measure_norms(loaded, "mlp_out", batches, layers).values()
    unit = load_direction(DEMO_DIRECTION).select(layers, anatomy.hidden_size)

    def count(multiplier: float) -> showcase.Counts:
        if multiplier == 0:
            return showcase.count(showcase.sample({"base": loaded}), loaded)["base"]
        push = compute_push(
            norms, unit, hidden_size=anatomy.hidden_size, multiplier=multiplier
        ).vectors
        with loaded.steered("mlp_out", push):
            drawn = showcase.sample({"steered": loaded})
        return showcase.count(drawn, loaded)["steered"]

    base_counts = count(0)
    return {m: showcase.compare(f"{m:+g}", count(m), base_counts) for m in (-1, 1, 3)}


def test_plus_one_makes_the_text_more_cheerful_and_keeps_it_fluent(measured):
    assert measured[1].continuations >= 90
    assert measured[1].target_ratio >= 1.6
    assert measured[1].target_interval[0] > 1.2
    assert measured[1].perplexity_ratio < 1.2


def test_minus_one_makes_it_less_cheerful(measured):
    assert measured[-1].target_ratio < 0.7
    assert measured[-1].target_interval[1] < 1
    assert measured[-1].perplexity_ratio < 1.2


def test_three_is_too_much(measured):
    assert measured[3].perplexity_ratio > 5


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
