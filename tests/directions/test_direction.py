"""Directions: what a file may hold, what comes back, what is refused and how it is said."""

from dataclasses import replace

import pytest
import torch
from conftest import HIDDEN
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GemmaConfig, GemmaForCausalLM

from bake.directions.direction import (
    SCALE_KEY,
    Direction,
    convert_to_input,
    effective_weight,
    normalise,
)
from bake.directions.direction_file import direction_bytes, load_direction
from bake.errors import DirectionError


def unit(seed, size=8):
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata=metadata)
    return path


def refused(path):
    """The one line that says why the file is refused."""
    with pytest.raises(DirectionError) as caught:
        load_direction(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_round_trip_of_one_vector_a_layer(tmp_path):
    metadata = {"model": "a/b", "method": "mean", "token": "last"}
    saved = Direction({4: unit(4), 2: unit(2), 10: unit(10)}, "attn_in", metadata)
    path = tmp_path / "d.safetensors"
    path.write_bytes(direction_bytes(saved))
    found = load_direction(path)
    assert (found.site, found.metadata) == ("attn_in", metadata)
    assert sorted(found.vectors) == [2, 4, 10]
    for layer in (2, 4, 10):
        torch.testing.assert_close(found.layer(layer), unit(layer), rtol=0, atol=1e-7)


def test_round_trip_of_one_vector_for_all_layers(tmp_path):
    path = tmp_path / "d.safetensors"
    path.write_bytes(direction_bytes(Direction({None: unit(1)}, "mlp_out")))
    found = load_direction(path)
    assert list(found.vectors) == [None]
    assert torch.equal(found.layer(0), found.layer(31))
    torch.testing.assert_close(found.layer(5), unit(1), rtol=0, atol=1e-7)


def test_file_is_what_the_contract_says(tmp_path):
    path = tmp_path / "d.safetensors"
    path.write_bytes(direction_bytes(Direction({3: unit(3)}, "mlp_in", {"token": "all"})))
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["direction.3"]
        assert file.get_tensor("direction.3").dtype == torch.float32
        assert file.metadata() == {"site": "mlp_in", "token": "all"}


def test_same_direction_gives_the_same_bytes():
    forward = {"a": "1", "b": "ü", "c": "3", "d": "4", "e": "5"}
    backward = dict(reversed(forward.items()))
    vectors = {layer: unit(layer) for layer in (2, 3, 4)}
    expected = direction_bytes(Direction(vectors, "mlp_out", forward))
    assert all(
        direction_bytes(Direction(vectors, "mlp_out", metadata)) == expected
        for metadata in (forward, backward) * 5
    )
    assert direction_bytes(Direction(vectors, "attn_out", forward)) != expected


def test_vectors_are_normalised_on_use(tmp_path):
    path = write(tmp_path / "d.safetensors", {"direction": torch.tensor([3.0, 0.0, -4.0]).half()})
    vector = load_direction(path).layer(0)
    assert vector.dtype == torch.float32
    torch.testing.assert_close(vector, torch.tensor([0.6, 0.0, -0.8]))


def test_tiny_and_large_vectors_keep_their_direction():
    for scale in (1e-30, 1e30):
        found = normalise(torch.tensor([3.0, 4.0]) * scale, "v")
        torch.testing.assert_close(found, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("scale", ["{", "3", '{"a": 1}', '{"3": NaN}', '{"3": -1}', '{"3": null}'])
def test_lengths_that_are_no_lengths_are_refused(tmp_path, scale):
    path = tmp_path / "d.safetensors"
    path.write_bytes(direction_bytes(Direction({3: unit(0)}, "mlp_out", {SCALE_KEY: '{"3": 2}'})))
    assert load_direction(path).own_lengths([3]) == {3: 2.0}
    path.write_bytes(direction_bytes(Direction({3: unit(0)}, "mlp_out", {SCALE_KEY: scale})))
    with pytest.raises(DirectionError, match="is not lengths by layer"):
        load_direction(path)


def test_file_without_a_site_means_mlp_out(tmp_path):
    assert (
        load_direction(write(tmp_path / "d.safetensors", {"direction": unit(0)})).site == "mlp_out"
    )


def test_other_tensors_in_the_file_are_ignored(tmp_path):
    path = write(tmp_path / "d.safetensors", {"direction.1": unit(1), "scores": torch.ones(2, 2)})
    assert list(load_direction(path).vectors) == [1]


def test_select_gives_the_layers_asked_for():
    direction = Direction({layer: unit(layer) for layer in range(6)}, "mlp_out")
    selected = direction.select(range(2, 5), 8)
    assert sorted(selected) == [2, 3, 4]
    assert torch.equal(selected[3], unit(3))


def test_wrong_width_names_both_numbers_and_the_other_model():
    direction = Direction({None: unit(0)}, "mlp_out", {"model": "org/other"})
    with pytest.raises(DirectionError, match=r"is 8 wide .* size is 4096; .* org/other"):
        direction.select([0], 4096)


def test_layer_without_a_vector_is_named():
    direction = Direction({10: unit(0), 2: unit(1)}, "mlp_out")
    with pytest.raises(DirectionError, match=r"no vector for layer 5; it has layers 2, 10"):
        direction.select([2, 5], 8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"direction": torch.zeros(8)}, "direction is all zeros"),
        ({"direction.3": torch.full((8,), torch.nan)}, "direction.3 holds NaN or infinite"),
        ({"direction": torch.full((8,), torch.inf)}, "holds NaN or infinite"),
        ({"direction": torch.ones(1, 8)}, r"direction has shape \(1, 8\)"),
        ({"direction": torch.tensor(1.0)}, r"direction has shape \(\)"),
        ({"weight": torch.ones(8)}, "no tensor named direction or direction.<layer>"),
        ({"direction.a": torch.ones(8)}, "no tensor named direction or direction.<layer>"),
        ({"direction": unit(0), "direction.3": unit(1)}, "both one direction for all layers and"),
        ({"direction.2": unit(0), "direction.3": unit(1, 9)}, r"different widths: \[8, 9\]"),
    ],
)
def test_unusable_tensors_are_refused(tmp_path, tensors, message):
    path = write(tmp_path / "d.safetensors", tensors)
    with pytest.raises(DirectionError, match=message):
        load_direction(path)
    refused(path)


def test_unknown_site_names_the_sites(tmp_path):
    path = write(tmp_path / "d.safetensors", {"direction": unit(0)}, {"site": "resid_post"})
    assert "unknown site 'resid_post'; one of mlp_out, attn_out, attn_in, mlp_in" in refused(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_file_that_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "d.safetensors"
    path.write_bytes(content)
    assert "is not a safetensors file" in refused(path)


def test_missing_file_and_directory_are_refused(tmp_path):
    assert "bake direction" in refused(tmp_path / "nowhere.safetensors")
    assert "no direction file" in refused(tmp_path)


def test_direction_describes_itself_without_its_vectors():
    assert Direction({5: unit(0), 2: unit(1)}, "attn_out", {"token": "last"}).to_dict() == {
        "site": "attn_out",
        "hidden_size": 8,
        "layers": [2, 5],
        "metadata": {"token": "last"},
    }
    assert Direction({None: unit(0)}, "mlp_out").to_dict()["layers"] == "all"


@pytest.mark.parametrize(
    ("architecture", "norms"),
    [
        ("llama", {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}),
        ("gpt2", {"attn_in": "ln_1", "mlp_in": "ln_2"}),
    ],
)
@pytest.mark.parametrize("site", ["attn_in", "mlp_in"])
def test_conversion_multiplies_by_the_norms_weight(open_tiny, architecture, norms, site):
    tiny = open_tiny(architecture)
    loaded = replace(tiny.loaded, structure=replace(tiny.structure, input_norms=norms))
    found = Direction({None: unit(0, HIDDEN)}, "mlp_out", {"token": "last"})
    converted = convert_to_input(found, loaded, site, [1, 4])
    assert (converted.site, sorted(converted.vectors)) == (site, [1, 4])
    assert converted.metadata == {"token": "last", "converted_from": "mlp_out"}
    for layer in (1, 4):
        name = f"{tiny.structure.layer(layer)}.{norms[site]}.weight"
        expected = tiny.loaded.model.get_parameter(name).detach() * unit(0, HIDDEN)
        expected = expected / expected.norm()
        torch.testing.assert_close(converted.layer(layer), expected, rtol=0, atol=1e-5)
        # The norm's weights are random, so that the conversion does something.
        assert float(converted.layer(layer) @ unit(0, HIDDEN)) < 0.9999


def test_conversion_to_a_site_without_a_norm_is_refused(open_tiny):
    tiny = open_tiny("llama")
    found = Direction({None: unit(0, HIDDEN)}, "mlp_out")
    with pytest.raises(DirectionError, match=r"no norm's output is attn_in .* --site attn_in"):
        convert_to_input(found, tiny.loaded, "attn_in", [1])


def test_weight_of_a_norm_that_adds_one_is_read_off_its_behaviour():
    config = GemmaConfig(
        hidden_size=HIDDEN,
        intermediate_size=88,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
    )
    norm = GemmaForCausalLM(config).model.layers[0].input_layernorm
    stored = torch.linspace(-0.5, 0.5, HIDDEN)
    with torch.no_grad():
        norm.weight.copy_(stored)
    torch.testing.assert_close(effective_weight(norm, HIDDEN), 1 + stored, rtol=1e-4, atol=1e-5)
