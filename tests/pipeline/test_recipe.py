"""Recipes: YAML and command line together, and what is refused before any work starts."""

import math
from dataclasses import fields

import pytest

from bake.errors import BakeError, UsageError
from bake.pipeline.recipe import Recipe, make_recipe, read_recipe

MINIMAL = {"model": "org/model", "output": "out", "direction": "d.safetensors"}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_gives_its_values_and_the_defaults(tmp_path):
    path = write(tmp_path, "model: org/model\noutput: out\npairs: p.jsonl\nmultiplier: -1.5\n")
    recipe = read_recipe(path, {})
    assert (recipe.model, recipe.output, recipe.pairs) == ("org/model", "out", "p.jsonl")
    assert recipe.multiplier == -1.5
    assert (recipe.band, recipe.law, recipe.site) == ("40:90", "inverse-sqrt-d", "auto")
    assert (recipe.prompts, recipe.direction, recipe.public) == ("neutral", None, False)


def test_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "model: org/model\noutput: out\nmultiplier: 2.0\nsite: attn_in\n")
    recipe = read_recipe(path, {"multiplier": 3.0, "output": "elsewhere"})
    assert (recipe.multiplier, recipe.output, recipe.site) == (3.0, "elsewhere", "attn_in")


def test_command_line_supplies_what_the_file_leaves_out(tmp_path):
    recipe = read_recipe(write(tmp_path, "multiplier: 2.0\n"), MINIMAL)
    assert (recipe.model, recipe.multiplier) == ("org/model", 2.0)


def test_every_option_can_be_in_the_file(tmp_path):
    values = Recipe(**MINIMAL).to_dict()
    assert set(values) == {field.name for field in fields(Recipe)}
    import yaml

    assert read_recipe(write(tmp_path, yaml.safe_dump(values)), {}) == Recipe(**MINIMAL)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("multiplyer", r"did you mean multiplier\?"),
        ("push-to-hub", r"did you mean push_to_hub\?"),
        ("colour", "known: .*multiplier.*"),
    ],
)
def test_unknown_key_is_named_with_what_was_meant(tmp_path, key, hint):
    path = write(tmp_path, f"model: m\noutput: o\n{key}: 2\n")
    with pytest.raises(BakeError, match=f"unknown key '{key}'; {hint}"):
        read_recipe(path, {})


def test_a_missing_model_is_named(tmp_path):
    values = {name: value for name, value in MINIMAL.items() if name != "model"}
    with pytest.raises(UsageError, match="no model is given"):
        make_recipe(values)
    with pytest.raises(UsageError, match="no model is given"):
        read_recipe(write(tmp_path, "multiplier: 2.0\n"), values)


@pytest.mark.parametrize(
    ("values", "output"),
    [
        ({"pairs": "formal-casual"}, "m-formal"),
        ({"pairs": "formal-casual", "multiplier": "-auto"}, "m-casual"),
        ({"pairs": "formal-casual", "multiplier": -0.5}, "m-casual"),
        ({"pairs": "data/warm-cold.jsonl"}, "m-warm-cold"),
        ({"direction": "/somewhere/pirate.gguf"}, "m-pirate"),
        ({"direction": ["a.safetensors", "b.safetensors:-0.5"]}, "m-a-b"),
        ({"direction": "sae.safetensors:W_dec[512]"}, "m-sae"),
        ({"direction": "direction.safetensors"}, "m-steered"),
        ({"direction": "bake-demo"}, "m-cheerful"),
    ],
)
def test_an_output_that_nobody_named_is_called_after_model_and_concept(values, output):
    assert make_recipe({"model": "org/m", **values}).output == output


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ({"band": (0.4, 0.9)}, {"band": "40:90"}),
        ({"band": [0.123, 1]}, {"band": "12.3:100"}),
        ({"layers": 14}, {"layers": "14"}),
        ({"layers": [3, 4, 8]}, {"layers": "3,4,8"}),
        ({"layers": range(3, 6)}, {"layers": "3,4,5"}),
        ({"coefficients": {3: 0.5, 4: -1}}, {"coefficients": "3=0.5,4=-1"}),
        ({"token": -2}, {"token": "-2"}),
    ],
)
def test_numbers_of_python_and_yaml_are_what_the_command_line_writes(values, written):
    made = make_recipe({**MINIMAL, **values})
    assert {name: getattr(made, name) for name in written} == written


def test_an_empty_output_is_refused_for_it_would_mean_the_working_directory():
    with pytest.raises(BakeError, match="output is empty"):
        make_recipe({**MINIMAL, "output": ""})
    assert make_recipe({**MINIMAL, "output": ""}, without_output=True).output == ""


@pytest.mark.parametrize("layers", ["0-999999999999", "²", "8-3", "3-", "", "9" * 5000])
def test_layers_that_no_model_has_are_refused_at_once(layers):
    with pytest.raises(BakeError, match="layers"):
        make_recipe({**MINIMAL, "layers": layers}).check()


@pytest.mark.parametrize("band", [(40, 90), (0.4,), ("a", "b"), (0.4, 0.5, 0.6)])
def test_a_band_that_is_not_two_shares_is_refused(band):
    with pytest.raises(BakeError, match="two shares of the depth"):
        make_recipe({**MINIMAL, "band": band})


@pytest.mark.parametrize("text", ["", "- model\n- output\n", "just words\n", "5\n"])
def test_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(BakeError, match=r"recipe\.yaml is not a mapping"):
        read_recipe(write(tmp_path, text), MINIMAL)


def test_broken_yaml_is_one_line(tmp_path):
    with pytest.raises(BakeError, match=r"recipe\.yaml is not YAML") as caught:
        read_recipe(write(tmp_path, "model: [a\noutput: }\n"), {})
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(BakeError, match=r"nowhere\.yaml cannot be read .*No such file"):
        read_recipe(tmp_path / "nowhere.yaml", {})


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(BakeError, match=r"recipe\.yaml is not UTF-8 text"):
        read_recipe(path, {})


@pytest.mark.parametrize("line", ["band: 40:50", "multiplier: 1e1"])
def test_values_that_yaml_reads_otherwise_mean_what_they_say_or_are_refused(tmp_path, line):
    """YAML 1.1 reads 40:50 as the number 2450 in base 60, and 1e1 as a string."""
    path = write(tmp_path, "model: m\noutput: o\ndirection: d\n" + line + "\n")
    try:
        recipe = read_recipe(path, {})
        recipe.check()
    except BakeError:
        return
    assert (recipe.band, recipe.multiplier) in {("40:50", None), ("40:90", 10.0)}


@pytest.mark.parametrize("value", ["strong", "[1, 2]"])
def test_multiplier_that_is_no_number_is_refused(tmp_path, value):
    path = write(tmp_path, f"model: m\noutput: o\ndirection: d\nmultiplier: {value}\n")
    with pytest.raises(BakeError, match="multiplier"):
        read_recipe(path, {}).check()


def test_empty_value_is_refused():
    with pytest.raises(BakeError, match="direction is empty"):
        make_recipe({**MINIMAL, "direction": ""})


def test_sound_recipe_passes():
    make_recipe(MINIMAL).check()
    optimized = {"method": "optimize", "steps": 9, "calibration": "n.json", "prompts": "p.txt"}
    make_recipe({"model": "m", "output": "o", "pairs": "p", **optimized}).check()
    make_recipe({**MINIMAL, "push_to_hub": "a/b", "public": True}).check()
    make_recipe({"model": "m", "output": "o", "pairs": "p"}).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "p.jsonl"}, "one of --direction FILE and --pairs FILE"),
        ({"direction": None}, "one of --direction FILE and --pairs FILE"),
        ({"multiplier": 0}, "must be finite and not zero"),
        ({"multiplier": -0.0}, "must be finite and not zero"),
        ({"law": "cubic"}, "unknown law 'cubic'; one of inverse-sqrt-d"),
        ({"site": "mlp"}, "unknown site 'mlp'; one of auto, mlp_out"),
        ({"route": "bias"}, "unknown route 'bias'; one of auto, native"),
        ({"slot": "write"}, "unknown slot 'write'; one of norm, projection"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; one of float32"),
        ({"statistic": "mode"}, "unknown statistic 'mode'; one of mean, median"),
        ({"band": "middle"}, "not START:STOP"),
        ({"coefficients": "3"}, "not LAYER=VALUE"),
        ({"public": True}, "--public is about publishing; give --push-to-hub"),
        ({"accept_licence": True}, "--accept-licence is about publishing"),
        ({"method": "pca"}, "--method is about --pairs, and a direction is given"),
        ({"from_layer": 3}, "--from-layer is about --pairs"),
        ({"direction": None, "pairs": "p", "steps": 9}, "--steps is about --method optimize"),
        ({"coefficients": "3=1", "law": "norm"}, "--law has no effect with --coefficients"),
        ({"coefficients": "3=1", "band": "0:50"}, "--band has no effect with --coefficients"),
        ({"calibration": "n.json", "prompts": "p.txt"}, "--prompts is what norms are measured on"),
    ],
)
def test_contradiction_is_refused(changes, message):
    with pytest.raises(BakeError, match=message):
        make_recipe({**MINIMAL, **changes}).check()


@pytest.mark.parametrize("multiplier", [math.nan, math.inf])
def test_multiplier_that_is_not_finite_is_refused_before_any_work(multiplier):
    with pytest.raises(BakeError, match="multiplier"):
        make_recipe({**MINIMAL, "multiplier": multiplier}).check()
