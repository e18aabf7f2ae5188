"""Where a direction is found, on a model that takes none in its residual stream."""

import json

import pytest
from conftest import TinyModel

from bake.cli.main import main
from bake.directions.direction_file import load_direction


@pytest.fixture
def gemma(make_model):
    return str(make_model(TinyModel("gemma2")))


def find(model, pairs, output, *options):
    return main(["direction", model, "--pairs", str(pairs), "-o", str(output), *options])


def test_what_export_takes_is_told_before_the_work(gemma, pairs_file, tmp_path, capsys):
    assert find(gemma, pairs_file, tmp_path / "d.safetensors") == 0
    told = capsys.readouterr().err
    assert "bake export takes attn_in on this model" in told
    assert "a direction found at mlp_out needs --convert-site" in told


def test_auto_finds_it_where_export_pushes(gemma, pairs_file, prompts_file, tmp_path, capsys):
    direction = tmp_path / "d.safetensors"
    assert find(gemma, pairs_file, direction, "--site", "auto") == 0
    assert "site attn_in, which bake export takes on this model" in capsys.readouterr().err
    rest = ["--direction", str(direction), "--prompts", str(prompts_file)]
    assert main(["export", gemma, *rest, "-m", "20", "-o", str(tmp_path / "out")]) == 0


def test_a_first_layer_that_sees_only_the_token_is_left_out(gemma, tmp_path, capsys):
    pairs = tmp_path / "alike.jsonl"
    rows = [{"prompt": f"{n} ", "positive": "abc.", "negative": "dcb."} for n in "abcdef"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    direction = tmp_path / "d.safetensors"
    assert find(gemma, pairs, direction, "--site", "attn_in") == 0
    assert "left out: layers 0, in which the texts do not differ" in capsys.readouterr().err
    found = load_direction(direction)
    assert 0 not in found.vectors
    assert 1 in found.vectors
    # Whoever names it is told that there is none.
    assert find(gemma, pairs, direction, "--site", "attn_in", "--layers", "0,1") == 1
    assert "at layer 0 is all zeros" in capsys.readouterr().err


def test_nothing_is_said_where_the_site_suits(make_model, pairs_file, tmp_path, capsys):
    assert find(str(make_model()), pairs_file, tmp_path / "d.safetensors") == 0
    assert "--site" not in capsys.readouterr().err


def test_exports_refusal_names_every_remedy(gemma, pairs_file, tmp_path, capsys):
    direction = tmp_path / "d.safetensors"
    find(gemma, pairs_file, direction)
    capsys.readouterr()
    output = tmp_path / "out"
    assert main(["export", gemma, "--direction", str(direction), "-o", str(output)]) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    for remedy in ("bake direction --site attn_in", "--convert-site", "--route insert"):
        assert remedy in refusal
    assert not output.exists()


def test_inspect_says_that_it_is_weaker_and_what_insert_costs(gemma, capsys):
    assert main(["inspect", gemma]) == 0
    shown = capsys.readouterr().out
    assert "a push at attn_in is normalised anew in every layer" in shown
    assert "extra layers on the default band, 50% more compute" in shown
