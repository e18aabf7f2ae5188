"""`bake.steer` and `bake.steered`: the proof's hooks around a model that Python holds."""

from __future__ import annotations

import pytest
import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

import bake
from bake.errors import BakeError, UnknownOptionError, UnsupportedError
from bake.io.shipped import DEMO_MODEL
from bake.pipeline.recipe import read_recipe

PAIRS = [
    ("The day was", " bright and warm.", " grey and cold."),
    ("She said", " how lovely!", " how dreadful."),
    ("The soup", " was a joy.", " was a sorrow."),
    ("He walked", " with a smile.", " with a frown."),
]


@pytest.fixture(scope="module")
def held():
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def norms(held):
    return bake.calibrate(held, prompts="toy-neutral")


def logits(model, tokenizer, text="Today was a day"):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits


def test_it_steers_turns_and_leaves_no_trace(held, norms):
    model, tokenizer = held
    base = logits(*held)
    with bake.steered(
        model, "bake-demo", multiplier=1.0, tokenizer=tokenizer, norms=norms
    ) as handle:
        once = logits(*held)
        handle.multiplier = -2
        twice = logits(*held)
        handle.multiplier = 0
        assert torch.equal(logits(*held), base)
        assert handle.push is None
        handle.multiplier = 1.0
        assert torch.equal(logits(*held), once)
        assert repr(handle) == "<Steered: bake-demo at mlp_out, m = 1>"
    assert float((once - base).abs().max()) > 0.5
    assert float((twice - once).abs().max()) > 0.5
    assert torch.equal(logits(*held), base)
    assert "removed" in repr(handle)
    handle.remove()
    with pytest.raises(BakeError, match="removed"):
        handle.multiplier = 1.0


def test_a_batch_padded_on_the_left_writes_what_each_prompt_writes_alone(held, norms):
    model, tokenizer = held
    tokenizer.padding_side = "left"
    texts = ["Today was", "When she opened the old door she saw", "Now"]

    def write(given):
        made = model.generate(
            **tokenizer(given, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False
        )
        return [row[-8:].tolist() for row in made]

    plain = write(texts)
    with bake.steered(held, "bake-demo", multiplier=2.0, norms=norms):
        together = write(texts)
        alone = [write([text])[0] for text in texts]
    assert together == alone
    assert together != plain


def test_what_is_steered_is_what_its_recipe_bakes(held, tmp_path):
    """With everything given as objects, which the recipe has to carry along."""
    base = logits(*held)
    handle = bake.steer(
        held, pairs=PAIRS, multiplier=1.5, layers=[3, 5], prompts=["One two.", "The sea is wide."]
    )
    steered = logits(*held)
    recipe = handle.save(tmp_path / "recipe.yaml")
    handle.remove()
    assert float((steered - base).abs().max()) > 0.1
    found = bake.pipeline.export.export(
        read_recipe(recipe, {"output": str(tmp_path / "out"), "dtype": "float32"})
    )
    assert found.equivalence.passed
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    effect = float((steered - base).abs().max())
    assert float((logits(baked, held[1]) - steered).abs().max()) < 1e-4 * effect


def test_a_recipe_of_named_files_names_them(held, norms, tmp_path):
    with bake.steered(held, "bake-demo", multiplier=0.5, band=(0.2, 0.6)) as handle:
        recipe = read_recipe(handle.save(tmp_path / "r.yaml"), {}, without_output=True)
        assert (recipe.direction, recipe.multiplier, recipe.band) == ("bake-demo", 0.5, "20:60")
        assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
        handle.multiplier = 0
        with pytest.raises(BakeError, match="must be finite and not zero"):
            handle.save(tmp_path / "zero.yaml")


def test_a_model_that_is_spread_over_devices_is_steered(tmp_path, held, norms):
    """As accelerate spreads it: weights on disk, its own hooks around every module."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    tokenizer = held[1]
    base = logits(model, tokenizer)
    with bake.steered(held, "bake-demo", multiplier=1.0, norms=norms):
        expected = logits(*held)
    with bake.steered(model, "bake-demo", multiplier=1.0, tokenizer=tokenizer, norms=norms):
        steered = logits(model, tokenizer)
    assert float((expected - base).abs().max()) > 0.5
    assert torch.allclose(steered, expected, atol=1e-5)
    measured = bake.calibrate((model, tokenizer), prompts="toy-neutral")
    assert measured.values() == pytest.approx(norms.values(), rel=1e-4)


def test_the_tokenizer_is_found_by_the_models_name(held, norms):
    handle = bake.steer(held[0], "bake-demo", norms=norms)
    handle.remove()


def test_what_cannot_be_steered_is_one_line(held, norms, tmp_path):
    model, tokenizer = held
    compiled = torch.compile(
        AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval(), backend="eager"
    )
    in_place = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    in_place.compile(backend="eager")
    for given in ((compiled, tokenizer), (in_place, tokenizer)):
        with pytest.raises(UnsupportedError, match="compiled"):
            bake.steer(given, "bake-demo")
    with pytest.raises(UnsupportedError, match="no name"):
        bake.steer(object(), "bake-demo")
    with pytest.raises(BakeError, match="finite"):
        bake.steer(held, "bake-demo", multiplier=float("nan"))
    with pytest.raises(BakeError, match="give one of"):
        bake.steer(held)
    with pytest.raises(UnknownOptionError, match="did you mean multiplier"):
        bake.steer(held, "bake-demo", multiplyer=1.0)
    with pytest.raises(BakeError, match="are of mlp_in"):
        bake.steer(
            held, "bake-demo", norms=bake.calibrate(held, prompts="toy-neutral", site="mlp_in")
        )
    assert not model._forward_hooks


def test_a_model_compiled_while_it_is_steered_is_not_turned(norms):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with bake.steered(model, "bake-demo", tokenizer=tokenizer, norms=norms) as handle:
        model.compile(backend="eager")
        with pytest.raises(UnsupportedError, match="compiled"):
            handle.multiplier = 2.0
