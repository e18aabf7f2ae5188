"""What Python may give instead of files: lists of pairs and texts, numbers, a loaded model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bake
from bake import ContrastPair
from bake.api.given import as_files
from bake.errors import BakeError, DirectionError, PromptError, UnsupportedError
from bake.io.shipped import DEMO_MODEL
from bake.texts.pairs import read_pairs

TUPLES = [
    ("The day was", " bright and warm.", " grey and cold."),
    ("She said", " how lovely!", " how dreadful."),
    ("The soup", " was a joy.", " was a sorrow."),
    ("He walked", " with a smile.", " with a frown."),
]


@pytest.fixture(scope="module")
def loaded():
    """The demo model and its tokenizer, loaded as anybody would."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL)


def same(one, other):
    return all(torch.equal(one.layer(layer), other.layer(layer)) for layer in one.vectors)


def test_pairs_may_be_tuples_mappings_or_pairs(loaded):
    keys = ("prompt", "positive", "negative")
    kinds = (
        TUPLES,
        [dict(zip(keys, entry, strict=True)) for entry in TUPLES],
        [ContrastPair(*entry) for entry in TUPLES],
    )
    found = [bake.extract_direction(loaded, pairs=pairs, layers=[3, 4]) for pairs in kinds]
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    other = bake.extract_direction(loaded, pairs=TUPLES[:2], layers=[3, 4])
    assert not same(found[0], other)


def test_conversations_survive_the_way_through_a_file():
    before = ({"role": "user", "content": "Hello"},)
    pair = ContrastPair("", "Good evening.", "hey", (before, before))
    with as_files({"pairs": [pair]}) as given:
        assert read_pairs(given["pairs"]) == [pair]


def test_what_json_cannot_hold_is_one_line_and_what_it_can_survives():
    for wrong, words in (
        ({"pairs": 5}, "pairs is of type int"),
        ({"prompts": 5}, "prompts is of type int"),
        ({"pairs": [{"positive": object(), "negative": "b"}]}, "not JSON serializable"),
    ):
        with pytest.raises(BakeError, match=words), as_files(wrong):
            pass
    with as_files({"prompts": ["half a pair: \ud800", "ü"]}) as given:
        assert len(Path(given["prompts"]).read_text().splitlines()) == 2


def test_what_is_no_pair_and_no_text_is_named():
    for pairs, words in (([("one",)], "a pair is a tuple"), ([3], "int")):
        with pytest.raises(DirectionError, match=words), as_files({"pairs": pairs}):
            pass
    with pytest.raises(PromptError, match="int"), as_files({"prompts": [3]}):
        pass


def test_a_loaded_model_gives_what_its_directory_gives(loaded):
    for function, options in (
        (bake.calibrate, {"prompts": ["The bus left at nine.", "A plate stood on the table."]}),
        (bake.extract_direction, {"pairs": TUPLES, "layers": 4}),
    ):
        here, there = function(loaded, **options), function(str(DEMO_MODEL), **options)
        if function is bake.calibrate:
            assert here.values() == pytest.approx(there.values(), rel=1e-6)
            assert here.values() != bake.calibrate(loaded, prompts=["Tea."]).values()
        else:
            cosine = torch.dot(here.layer(4), there.layer(4))
            assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert bake.inspect(loaded).automatic.site == bake.inspect("bake-demo").automatic.site


def test_a_sweep_takes_a_loaded_model_and_lists(loaded, tmp_path):
    found = bake.sweep(
        loaded,
        direction=bake.extract_direction(loaded, pairs=TUPLES),
        pairs=TUPLES,
        neutral=["The bus left at nine.", "A plate stood on the table."],
        openings=["The day"],
        words=["bright"],
        bands=[(0.4, 0.9)],
        multipliers=[-1, 1],
        control_seeds=0,
        samples=1,
        new_tokens=4,
        output=tmp_path / "sweep",
    )
    assert [point.arm.multiplier for point in found.found.curve()] == [-1, 0, 1]
    assert "<table>" in found._repr_html_()
    assert len(repr(found)) < 300


def test_what_is_no_model_is_refused(loaded):
    model, tokenizer = loaded
    for given, words in (
        (3, "not int"),
        ((model,), "not tuple"),
        ((tokenizer, model), "not tuple"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            bake.inspect(given)
    model.train()
    try:
        with pytest.raises(UnsupportedError, match="training mode"):
            bake.calibrate(loaded)
    finally:
        model.eval()


def test_a_misspelt_keyword_is_named_with_the_one_that_was_meant():
    with pytest.raises(
        BakeError, match="export has no option 'multplier'; did you mean multiplier"
    ):
        bake.export("m", multplier=1)
    with pytest.raises(TypeError):  # It is Python's error too.
        bake.calibrate("m", promts=["x"])


def test_results_are_short_where_they_are_shown(loaded, tmp_path):
    direction = bake.extract_direction(loaded, pairs=TUPLES)
    norms = bake.calibrate(loaded, prompts=["The bus left at nine."])
    result = bake.export(
        "bake-demo",
        direction=direction,
        layers=[4, 5],
        coefficients=None,
        multiplier=0.5,
        prompts=["The bus left at nine.", "A plate stood on the table."],
        output=tmp_path / "out",
    )
    for shown in (direction, norms, result):
        assert len(repr(shown)) < 300
        assert "\n" not in repr(shown)
        assert len(shown._repr_html_()) < 6000
    assert [entry.layer for entry in result.push.layers] == [4, 5]
    assert json.loads((tmp_path / "out" / "bake.json").read_text())["band"] == [4, 6]


def test_html_shows_what_strangers_wrote_as_text(loaded):
    direction = bake.extract_direction(loaded, pairs=TUPLES, layers=[3])
    direction.metadata["note"] = "<script>alert(1)</script>"
    assert "<script>" not in direction._repr_html_()


def test_messages_go_to_the_logger(caplog):
    logger = logging.getLogger("bake")
    logger.propagate = True
    try:
        with caplog.at_level(logging.INFO, "bake"), pytest.raises(BakeError):
            bake.export("no-such/model/at-all", pairs="formal-casual")
    finally:
        logger.propagate = False
    assert "./at-all-formal" in caplog.text
