"""From pairs to a direction with figures: options, errors, the command, and export on the same code."""

import json

import pytest
import torch
from conftest import PAIRS

from bake import extract_direction
from bake.anatomy.base import load_base, open_base
from bake.cli.main import main
from bake.directions.direction_file import load_direction
from bake.directions.extract import ExtractionOptions, extract
from bake.directions.separation import read_separation
from bake.errors import BakeError
from bake.io.shipped import DEMO_NAME
from bake.pipeline import decision
from bake.pipeline.recipe import make_recipe
from bake.texts.pairs import ContrastPair, read_pairs

CONTRAST = [ContrastPair(**pair) for pair in PAIRS]


def find(tiny, layers=(1, 3), **options):
    return extract(
        tiny.loaded,
        "mlp_out",
        CONTRAST,
        list(layers),
        ExtractionOptions(**options),
    )


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_every_method_gives_unit_vectors_and_figures(open_tiny, method):
    found = find(open_tiny("llama"), method=method)
    assert sorted(found.vectors) == [1, 3]
    assert all(
        vector.norm().item() == pytest.approx(1, abs=1e-6) for vector in found.vectors.values()
    )
    separation = read_separation(found)
    assert [entry.layer for entry in separation.layers] == [1, 3]
    assert (separation.pairs, separation.folds) == (4, 4)
    assert found.metadata["method"] == method


def test_methods_find_different_directions(open_tiny):
    mean, pca, probe = (
        find(open_tiny("llama"), method=m).layer(3) for m in ("mean", "pca", "probe")
    )
    assert max(float(mean @ pca), float(mean @ probe), float(pca @ probe)) < 0.98


def test_one_layers_direction_serves_all(open_tiny, tmp_path):
    tiny = open_tiny("llama")
    one, each = find(tiny, from_layer=3), find(tiny)
    assert list(one.vectors) == [None]
    assert torch.equal(one.layer(0), each.layer(3))
    assert one.metadata["from_layer"] == "3"
    assert [entry.layer for entry in read_separation(one).layers] == [3]


OTHERS = [{**pair, "prompt": "Then: " + pair["prompt"]} for pair in PAIRS]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_held_out_pairs_are_measured_on(open_tiny, tmp_path):
    held_out = write_rows(tmp_path / "pairs.jsonl", OTHERS)
    found = read_separation(find(open_tiny("llama"), held_out=held_out))
    assert (found.pairs, found.folds) == (4, 0)


def test_held_out_pairs_that_are_known_are_left_out(open_tiny, pairs_file, tmp_path, capsys):
    shouted = {key: text.upper() for key, text in PAIRS[0].items()}
    held_out = write_rows(tmp_path / "mixed.jsonl", [*OTHERS, PAIRS[1], shouted])
    assert read_separation(find(open_tiny("llama"), held_out=held_out)).pairs == 4
    assert (
        "2 of 6 pairs are among those that the direction is found from" in capsys.readouterr().err
    )
    with pytest.raises(BakeError, match=r"every pair of .* is among those"):
        find(open_tiny("llama"), held_out=str(pairs_file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lda"}, "unknown method 'lda'; one of mean, pca, probe"),
        ({"token": "first"}, "unknown token position 'first'"),
        ({"chat_template": "always"}, "unknown chat template 'always'; one of auto, never"),
        ({"from_layer": 6}, "the model has no layer 6; its layers are 0 to 5"),
        ({"from_layer": -1}, "the model has no layer -1"),
        ({"layers": (2, 9)}, "the model has no layer 9; its layers are 0 to 5"),
        ({"layers": ()}, "no layer was asked for"),
        ({"held_out": "nowhere"}, "no pairs file or set 'nowhere'"),
    ],
)
def test_wrong_choice_is_one_line(open_tiny, options, message):
    with pytest.raises(BakeError, match=message):
        find(open_tiny("llama"), **options)


def test_shipped_model_separates_held_out_pairs():
    """The promise of the method on a model that has learned something: 95 % in the band."""
    found = extract_direction(
        DEMO_NAME,
        pairs="toy-cheerful-gloomy",
        held_out="toy-cheerful-gloomy.held-out",
        token="mean",
    )
    separation = read_separation(found)
    assert separation.pairs == 48
    band = [entry for entry in separation.layers if 3 <= entry.layer < 8]
    assert max(entry.accuracy for entry in band) >= 0.95
    assert max(entry.threshold_accuracy for entry in band) >= 0.95
    assert all(entry.stability > 0.9 for entry in band)
    assert separation.warning is None


def test_a_direction_that_does_not_separate_is_announced(open_tiny, tmp_path, capsys):
    """Held-out pairs of which every second one is labelled the other way round: chance by design."""
    swapped = [
        {**pair, "positive": pair["negative"], "negative": pair["positive"]} for pair in OTHERS
    ]
    find(open_tiny("llama"), [1], held_out=write_rows(tmp_path / "fair", OTHERS))
    assert capsys.readouterr().err == ""
    find(open_tiny("llama"), held_out=write_rows(tmp_path / "mixed", OTHERS + swapped))
    assert "does not separate 8 held-out pairs in any layer" in capsys.readouterr().err


def test_command_prints_a_table_and_json(llama, pairs_file, tmp_path, capsys):
    output = tmp_path / "d.safetensors"
    arguments = ["direction", str(llama), "--pairs", str(pairs_file), "-o", str(output)]
    assert main([*arguments, "--method", "probe", "--token", "-1", "--layers", "0,3-4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("3 directions of width 32 at mlp_out, by probe over 4 pairs (token: -1)")
    assert "95 % interval" in text
    assert main([*arguments, "--from-layer", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["layers"] == "all"
    assert values["separation"]["layers"][0]["layer"] == 2
    assert "separation" not in values["metadata"]
    assert read_separation(load_direction(output)).pairs == 4


@pytest.mark.parametrize(
    "arguments",
    [["--token", "99"], ["--layers", "9"], ["--layers", "a-b"], ["--held-out", "nowhere"]],
)
def test_a_refused_command_leaves_no_file(llama, pairs_file, tmp_path, capsys, arguments):
    output = tmp_path / "new" / "d.safetensors"
    given = ["direction", str(llama), "--pairs", str(pairs_file), "-o", str(output)]
    assert main([*given, *arguments]) == 1
    printed = capsys.readouterr()
    assert [line[:12] for line in printed.err.splitlines()] == ["bake: error:"]
    assert not output.parent.exists()


def test_another_tools_format_is_converted_to_and_not_written_into(llama, pairs_file, tmp_path):
    with pytest.raises(BakeError, match="bake direction convert then writes other formats"):
        extract_direction(str(llama), pairs=pairs_file, output=tmp_path / "d.gguf")


def test_too_few_pairs_to_measure_with_is_announced(llama, tmp_path, capsys):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps(PAIRS[0]) + "\n")
    assert main(["direction", str(llama), "--pairs", str(file), "-o", str(tmp_path / "d")]) == 0
    printed = capsys.readouterr()
    assert "by mean over 1 pair (token: last)" in printed.out
    assert "fewer than 4 pairs cannot say how well a direction separates" in printed.err


def test_export_finds_the_direction_that_bake_direction_finds(llama, pairs_file):
    choices = {"method": "probe", "token": -1, "seed": 3}
    found = extract_direction(str(llama), pairs=pairs_file, **choices)
    recipe = make_recipe({"model": str(llama), "output": "o", "pairs": str(pairs_file), **choices})
    base = open_base(str(llama))
    exported = decision.extract(
        base,
        load_base(base),
        recipe,
        read_pairs(pairs_file),
        "mlp_out",
        range(6),
    )
    assert exported.metadata == found.metadata
    plain = extract_direction(str(llama), pairs=pairs_file)
    for layer in range(6):
        assert torch.equal(exported.layer(layer), found.layer(layer))
        assert float(found.layer(layer) @ plain.layer(layer)) < 0.99


def test_recipe_takes_a_tokens_index_and_refuses_unknown_choices_before_any_work(tmp_path):
    from bake import export

    values = {"model": "m", "output": "o", "pairs": "p"}
    assert make_recipe({**values, "token": -2}).token == "-2"
    with pytest.raises(BakeError, match="unknown method 'lda'"):
        export("no-such-model", pairs="p", output=tmp_path / "o", method="lda")
