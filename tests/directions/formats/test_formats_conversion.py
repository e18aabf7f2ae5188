"""bake direction convert: what is written, what survives a round trip, and the command itself."""

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS

from bake import api
from bake.api import ablate, convert_direction, export
from bake.cli.main import main
from bake.directions.direction import SCALE_KEY, Direction
from bake.directions.direction_file import direction_bytes, load_direction
from bake.directions.formats import read_direction, read_given
from bake.directions.formats.conversion import convert
from bake.directions.formats.gguf_writer import write_gguf
from bake.errors import BakeError, DirectionError


def rows(layers, width=HIDDEN):
    generator = torch.Generator().manual_seed(11)
    return {layer: torch.randn(width, generator=generator) * 3 for layer in layers}


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("between", [".safetensors", ".npz"])
def test_control_vector_through_another_format_is_itself(tmp_path, between):
    """GGUF → bake → GGUF is the identity, byte for byte."""
    original = write(tmp_path / "a.gguf", write_gguf(rows([1, 2, 5]), "qwen2"))
    middle = tmp_path / f"b{between}"
    api.convert_direction(original, output=middle)
    api.convert_direction(middle, output=tmp_path / "c.gguf", model_hint="qwen2")
    assert (tmp_path / "c.gguf").read_bytes() == original.read_bytes()


def test_hint_and_vectors_survive_a_file_of_bake(tmp_path):
    original = write(tmp_path / "a.gguf", write_gguf(rows([1, 2]), "qwen2"))
    api.convert_direction(original, output=tmp_path / "b.safetensors")
    assert load_direction(tmp_path / "b.safetensors").metadata["model_hint"] == "qwen2"
    again = api.convert_direction(tmp_path / "b.safetensors", output=tmp_path / "c.gguf")
    assert again.content == original.read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_vectors_keep_their_bits(tmp_path, suffix):
    given = rows(range(3))
    torch.save(given, tmp_path / "v.pt")
    api.convert_direction(tmp_path / "v.pt", output=tmp_path / f"out{suffix}")
    found, _ = read_given(tmp_path / f"out{suffix}")
    assert all(torch.equal(found.vectors[layer], given[layer]) for layer in given)


@pytest.mark.parametrize("suffix", [".gguf", ".npz", ".safetensors"])
def test_an_optimised_direction_is_written_as_long_as_it_came_out(tmp_path, suffix):
    """Its file has unit vectors, and their lengths in the metadata; moved layers keep theirs."""
    units = {layer: vector / vector.norm() for layer, vector in rows([2, 3]).items()}
    content = direction_bytes(Direction(units, "mlp_out", {SCALE_KEY: '{"2": 5.0, "3": 0.5}'}))
    path = write(tmp_path / "d.safetensors", content)
    api.convert_direction(path, output=tmp_path / f"out{suffix}", layer_offset=1)
    found = read_direction(tmp_path / f"out{suffix}")
    assert found.own_lengths([3, 4]) == pytest.approx({3: 5.0, 4: 0.5})
    assert torch.allclose(found.layer(4), units[3])


def test_one_vector_for_all_layers_needs_their_number(tmp_path):
    vector = rows([0])[0]
    path = write(tmp_path / "d.safetensors", direction_bytes(Direction({None: vector}, "mlp_out")))
    with pytest.raises(DirectionError, match="--layers N or --model MODEL"):
        convert(path, tmp_path / "v.gguf")
    converted = convert(path, tmp_path / "v.gguf", layer_count=4)
    found, _ = read_given(write(tmp_path / "v.gguf", converted.content))
    assert sorted(found.vectors) == [1, 2, 3]
    assert all(torch.equal(row, vector) for row in found.vectors.values())
    one = convert(path, tmp_path / "v.npy")
    assert np.load(write(tmp_path / "v.npy", one.content)).shape == (HIDDEN,)
    spread = convert(path, tmp_path / "v.npy", layer_count=4)
    assert np.load(write(tmp_path / "v.npy", spread.content)).shape == (4, HIDDEN)


def test_model_says_how_many_layers_there_are_and_how_wide(llama, tmp_path):
    np.save(tmp_path / "v.npy", rows([0])[0].numpy())
    api.convert_direction(tmp_path / "v.npy", output=tmp_path / "v.gguf", model=str(llama))
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert [tensor.name for tensor in reader.tensors] == [
        f"direction.{layer}" for layer in range(1, LAYERS)
    ]
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    np.save(tmp_path / "w.npy", np.ones(HIDDEN + 1))
    with pytest.raises(DirectionError, match=r"is 33 wide and the model's hidden size is 32"):
        api.convert_direction(tmp_path / "w.npy", output=tmp_path / "w.gguf", model=str(llama))
    assert not (tmp_path / "w.gguf").exists()


def test_layer_0_has_no_place_in_a_control_vector(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((3, 8)))
    converted = convert(tmp_path / "v.npy", tmp_path / "v.gguf")
    assert converted.layers == "layers 1 to 2"
    assert converted.notes == ("layer 0 is left out: llama.cpp takes no control vector there",)
    torch.save({0: torch.ones(8)}, tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="no layer from 1 on is left"):
        convert(tmp_path / "v.pt", tmp_path / "v.gguf")


def test_site_that_llama_cpp_does_not_have_is_refused(tmp_path):
    torch.save(rows([1]), tmp_path / "v.pt")
    with pytest.raises(DirectionError, match="found at attn_in and cannot be used at mlp_out"):
        convert(tmp_path / "v.pt", tmp_path / "v.gguf", site="attn_in")
    note = convert(tmp_path / "v.pt", tmp_path / "v.gguf", site="attn_out").notes[0]
    assert "same residual stream" in note
    assert "--direction-site attn_in" in str(
        convert(tmp_path / "v.pt", tmp_path / "v.npz", site="attn_in").notes
    )
    content = convert(tmp_path / "v.pt", tmp_path / "v.safetensors", site="attn_in").content
    assert load_direction(write(tmp_path / "v.safetensors", content)).site == "attn_in"


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("v.txt", {}, "of no format that bake writes; name it .gguf, .npy, .npz, .safetensors"),
        ("v.npy", {}, "begins at layer 1 or has gaps"),
        ("v.npz", {"layer_count": 2}, "vector for layer 2 and the model has layers 0 to 1"),
        ("v.npz", {"layer_count": 0}, "--layers 0 is no number of layers"),
    ],
)
def test_what_cannot_be_written(tmp_path, output, options, message):
    torch.save(rows([1, 2]), tmp_path / "v.pt")
    with pytest.raises(DirectionError, match=message):
        convert(tmp_path / "v.pt", tmp_path / output, **options)


def test_values_beyond_float32_are_refused(tmp_path):
    np.save(tmp_path / "v.npy", np.full(8, 1e100))
    with pytest.raises(DirectionError, match="NaN or infinite"):
        convert(tmp_path / "v.npy", tmp_path / "v.npz")


def test_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DirectionError, match=r"pip install 'bake-steering\[gguf\]'"):
        write_gguf(rows([1]), "llama")


def test_command(tmp_path, capsys):
    np.save(tmp_path / "v.npy", np.ones((4, 8)))
    words = ["direction", "convert", str(tmp_path / "v.npy"), "-o", str(tmp_path / "v.gguf")]
    assert main([*words, "--layer-offset", "1", "--model-hint", "llama", "--json"]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert (values["layers"], values["hidden_size"]) == ("layers 1 to 4", 8)
    assert "direction understood as numpy array" in printed.err
    assert main(words) == 0
    assert "layers 1 to 3, width 8, at mlp_out" in capsys.readouterr().out
    assert main(["direction", "convert", "none.npy", "-o", str(tmp_path / "x.gguf")]) == 1
    assert capsys.readouterr().err == (
        "bake: error: no direction file none.npy; make one with bake direction\n"
    )
    assert not (tmp_path / "x.gguf").exists()


def test_model_named_like_a_command_is_given_as_a_path(capsys):
    for words in (["direction", "convert"], ["direction"], ["direction", "./convert"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        usage = capsys.readouterr().err
        assert ("bake direction convert FILE" in usage) == (words[1:] == ["convert"])


class TestPush:
    """--push: what a bake adds, so that scale 1 steers as the bake does."""

    def test_vectors_are_the_bakes(self, make_model, tmp_path):
        base = make_model()
        vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
        result = export(base, direction=vector, site="mlp_out", output=tmp_path / "out")
        found = convert_direction(tmp_path / "out", output=tmp_path / "x.gguf", push=True)
        assert found.layers == "layers 2 to 4"
        read = read_direction(tmp_path / "x.gguf")
        for layer, wanted in result.push.vectors.items():
            own = read.layer(layer) * read.lengths[layer]
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)

    def test_what_is_no_push_is_told(self, make_model, tmp_path):
        base = make_model()
        vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
        with pytest.raises(BakeError, match=r"bake\.json"):
            convert_direction(base, output=tmp_path / "x.gguf", push=True)
        ablate(base, direction=vector, output=tmp_path / "ablated")
        with pytest.raises(DirectionError, match="no push: something was taken out"):
            convert_direction(tmp_path / "ablated", output=tmp_path / "x.gguf", push=True)
        with pytest.raises(DirectionError, match="says the site itself"):
            convert_direction(vector, output=tmp_path / "x.gguf", push=True)
        export(base, direction=vector, site="attn_in", convert_site=True, output=tmp_path / "in")
        with pytest.raises(DirectionError, match="attn_in"):
            convert_direction(tmp_path / "in", output=tmp_path / "x.gguf", push=True)
        assert not (tmp_path / "x.gguf").exists()
