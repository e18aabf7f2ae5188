"""What a direction says: tokens against the model's own logits, and cosines to other directions."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, FINAL_NORMS, HIDDEN, STRUCTURES

from bake import show_direction
from bake.anatomy import examine
from bake.cli.main import main
from bake.directions.direction import Direction, normalise
from bake.directions.direction_file import direction_bytes
from bake.directions.logit_lens import compare_directions, find_final_norm, read_tokens
from bake.errors import BakeError
from bake.io.shipped import DEMO_NAME


def random_direction(layers=(0, 4), seed=0, site="mlp_out", width=HIDDEN):
    generator = torch.Generator().manual_seed(seed)
    vectors = {layer: normalise(torch.randn(width, generator=generator), "") for layer in layers}
    return Direction(vectors, site)


@pytest.fixture
def save(tmp_path):
    def write(name, direction):
        path = tmp_path / name
        path.write_bytes(direction_bytes(direction))
        return path

    return write


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_tokens_are_those_whose_logits_move(open_tiny, architecture):
    """A tiny step along the direction before the final norm, through the model's own norm and head.

    The step starts where the norm's scale does not change: at a stream orthogonal to the direction.
    """
    tiny = open_tiny(architecture)
    direction = random_direction(layers=(5,))
    (found,) = read_tokens(tiny.loaded, direction, count=5)
    norm = tiny.loaded.model.get_submodule(FINAL_NORMS[architecture])
    assert find_final_norm(tiny.loaded) is norm
    unit = direction.layer(5).double()
    stream = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    centred = unit - unit.mean() if architecture == "gpt2" else unit
    stream -= (stream - stream.mean()) @ centred / (centred @ centred) * centred
    with torch.no_grad():
        moved = [
            tiny.loaded.model.lm_head(norm((stream + step * unit).float()[None, None]))[0, 0]
            for step in (-1e-2, 1e-2)
        ]
    change = moved[1] - moved[0]
    for largest, scores in ((True, found.raised), (False, found.lowered)):
        expected = torch.topk(change, 5, largest=largest).indices.tolist()
        assert [score.token for score in scores] == [tiny.tokenizer.decode([i]) for i in expected]
    assert found.raised[0].score > 0 > found.lowered[0].score


@pytest.fixture
def make(load_tiny, monkeypatch):
    """Return a function: model type and options → a random model of transformers' with its structure."""

    def build(model_type, **options):
        sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = {**sizes, "intermediate_size": 88, **options}
        monkeypatch.setitem(CONFIGS, model_type, config)
        monkeypatch.setitem(STRUCTURES, model_type, STRUCTURES["llama"])
        tiny = load_tiny(model_type)
        structure = examine(tiny.loaded.model.config).structure
        return replace(tiny, loaded=replace(tiny.loaded, structure=structure))

    return build


@pytest.mark.parametrize(
    ("model_type", "options", "norm"),
    [
        ("lfm2", {"num_key_value_heads": 2}, "model.embedding_norm"),
        (
            "gemma4_text",
            {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
            "model.norm",
        ),
        ("olmo", {}, "model.norm"),
    ],
)
def test_the_final_norm_is_known_by_what_flows_through_it(make, model_type, options, norm):
    """Its name says something else, another norm stands behind it, it has no parameter."""
    tiny = make(model_type, **options)
    direction = random_direction(layers=(1,))
    assert find_final_norm(tiny.loaded) is tiny.loaded.model.get_submodule(norm)
    (found,) = read_tokens(tiny.loaded, direction)
    assert found.raised[0].score > 0 > found.lowered[0].score


def test_an_unembedding_that_reads_something_else_is_refused(make):
    tiny = make("modernbert-decoder")
    with pytest.raises(BakeError, match="does more than one norm"):
        read_tokens(tiny.loaded, random_direction(layers=(1,)))


def test_the_norms_weight_counts(load_tiny):
    """Without γ other tokens would come first: the test above would not see it left out otherwise."""
    tiny, direction = load_tiny("llama"), random_direction(layers=(5,))
    arguments = (tiny.loaded, direction)
    before = read_tokens(*arguments)
    with torch.no_grad():
        tiny.loaded.model.model.norm.weight[: HIDDEN // 2] *= -3
    assert read_tokens(*arguments) != before


def test_one_direction_for_all_layers(open_tiny):
    tiny = open_tiny("llama")
    single = Direction({None: random_direction((0,)).layer(0)}, "mlp_out")
    (found,) = read_tokens(tiny.loaded, single)
    assert found.layer is None


def test_shipped_direction_says_what_it_is_about():
    _, reading = show_direction(DEMO_NAME, model=DEMO_NAME, tokens=5)
    last = reading.layers[-1]
    assert {" Happily", " Luckily"} <= {score.token for score in last.raised}
    assert {" Sadly", " Unluckily"} <= {score.token for score in last.lowered}


def test_cosines_to_other_directions():
    first, second = random_direction((0, 4)), random_direction((4, 5), seed=1)
    single = Direction({None: first.layer(4)}, "mlp_out")
    turned = Direction({4: -first.layer(4)}, "mlp_out")
    found = compare_directions(first, {"other": second, "one": single, "turned": turned})
    assert set(found["other"]) == {4}
    assert abs(found["other"][4]) < 0.6
    assert found["one"][4] == pytest.approx(1)
    assert found["one"][0] < 0.6
    assert found["turned"] == {4: pytest.approx(-1)}
    assert compare_directions(single, {"same": single}) == {"same": {None: pytest.approx(1)}}


def test_command(llama, save, capsys):
    first, second = (
        save("a.safetensors", random_direction()),
        save("b.safetensors", random_direction()),
    )
    arguments = ["direction", "show", str(first)]
    assert main([*arguments, "--model", str(llama), "--compare", str(second), "--tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 directions of width 32 at mlp_out\n\n0  raised ")
    assert "b.safetensors" in text.splitlines()[-3]
    assert text.splitlines()[-1].split() == ["4", "1.000"]
    assert main([*arguments, "--model", str(llama), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [entry["layer"] for entry in values["reading"]["layers"]] == [0, 4]
    assert len(values["reading"]["layers"][0]["raised"]) == 10


def test_show_says_how_a_file_was_understood_and_takes_corrections(llama, tmp_path, capsys):
    """A decoder whose features are columns is known by the model's width; layer numbers can be moved."""
    wanted = random_direction((2,)).layer(2)
    decoder = torch.randn(HIDDEN, 7, generator=torch.Generator().manual_seed(2))
    decoder[:, 3] = wanted
    torch.save({"decoder.weight": decoder}, tmp_path / "sae.pt")
    reference = f"{tmp_path}/sae.pt:decoder.weight[3]"
    given, _ = show_direction(reference, model=str(llama))
    assert torch.allclose(given.layer(0), wanted)
    assert "understood as autoencoder decoder" in capsys.readouterr().err
    torch.save({3: wanted}, tmp_path / "one.pt")
    arguments = ["direction", "show", str(tmp_path / "one.pt"), "--compare", reference]
    corrected = ["--layer-offset", "-1", "--direction-site", "attn_out"]
    assert main([*arguments, *corrected, "--model", str(llama)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("1 direction of width 32 at attn_out\n\n2  raised ")
    assert shown.out.split()[-2:] == ["2", "1.000"]
    assert shown.err.count("direction understood as ") == 2
    assert main(["direction", "show", str(tmp_path / "one.pt")]) == 0
    assert "unit length; site mlp_out (the file names none)" in capsys.readouterr().err
    assert main([*arguments, "--layer-offset", "3", "--model", str(llama)]) == 1
    assert "the model has layers 0 to 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("direction", "options", "message"),
    [
        (random_direction(site="attn_in"), {}, "found at attn_in, a normalised input"),
        (random_direction(width=48), {}, "48 wide and the model's hidden size is 32"),
        (random_direction(), {"count": 0}, "0 tokens show nothing"),
    ],
)
def test_what_cannot_be_shown_is_one_line(open_tiny, direction, options, message):
    tiny = open_tiny("llama")
    with pytest.raises(BakeError, match=message):
        read_tokens(tiny.loaded, direction, **options)


def test_streamed_model_is_refused(open_tiny):
    tiny = open_tiny("llama")
    streamed = replace(tiny.loaded, weights=object())
    with pytest.raises(BakeError, match="no unembedding in memory"):
        read_tokens(streamed, random_direction())


def test_directions_that_cannot_be_compared_are_refused():
    with pytest.raises(BakeError, match="other is 48 wide and the direction 32"):
        compare_directions(random_direction(), {"other": random_direction(width=48)})
    with pytest.raises(BakeError, match=r"other was found at attn_in .* different spaces"):
        compare_directions(random_direction(), {"other": random_direction(site="attn_in")})
    with pytest.raises(BakeError, match="other has no layer in common"):
        compare_directions(random_direction((0,)), {"other": random_direction((1,))})
