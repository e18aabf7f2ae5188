"""Directions of other tools: which reader is chosen, what is understood, how it meets the model."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS
from safetensors.torch import load_file, save_file

from bake import api
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes, load_direction
from bake.directions.formats import fit_direction, read_direction
from bake.directions.formats.gguf_writer import write_gguf
from bake.directions.formats.given import name_layers
from bake.directions.formats.objects import given_as_file, read_object
from bake.directions.formats.places import layer_number
from bake.errors import BakeError, DirectionError
from bake.pipeline.given_directions import read_directions
from bake.pipeline.recipe import Recipe
from bake.strength.coefficients import OWN_LENGTH_LAW, compute_push


def vectors(layers, width=8, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(width, generator=generator) * scale for layer in layers}


@dataclass
class SteeringVector:
    """The shape of the steering-vectors library's class."""

    layer_activations: dict
    layer_type: str = "decoder_block"
    more: list = field(default_factory=list)


def assert_same_lines(direction, expected):
    assert sorted(direction.vectors) == sorted(expected)
    for layer, vector in expected.items():
        torch.testing.assert_close(direction.vectors[layer], vector / vector.norm())
        assert direction.lengths[layer] == pytest.approx(float(vector.norm()))


@pytest.mark.parametrize("name", ["v.npy", "v.npz", "v.pt", "v.pth", "v.bin", "v.gguf", "nameless"])
def test_every_format_gives_the_same_direction(tmp_path, name):
    given = vectors(range(1, 4))
    path = tmp_path / name
    if name == "v.npy":
        np.save(path, np.stack([np.ones(8), *[given[layer].numpy() for layer in (1, 2, 3)]]))
        given[0] = torch.ones(8)
    elif name == "v.npz":
        np.savez(path, **{str(layer): vector.numpy() for layer, vector in given.items()})
    elif name in ("v.gguf", "nameless"):
        path.write_bytes(write_gguf(given, "llama"))
    else:
        torch.save(given, path)
    found = read_direction(str(path))
    assert_same_lines(found, given)
    assert found.site == "mlp_out"
    assert f"{len(given)} vectors of width 8" in found.metadata["understood"]
    assert found.metadata["understood"].startswith(found.metadata["format"])


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_archives_without_a_name_are_told_apart_by_what_is_in_them(tmp_path, kind):
    given, path = vectors([2]), tmp_path / "vector"
    with path.open("wb") as stream:
        if kind == "npz":
            np.savez(stream, layer_2=given[2].numpy())
        else:
            torch.save(given, stream)
    assert_same_lines(read_direction(path), given)


def test_bakes_own_file_is_read_as_ever(tmp_path):
    path = tmp_path / "d.safetensors"
    path.write_bytes(direction_bytes(Direction(vectors([2, 3]), "attn_out", {"token": "last"})))
    found, expected = read_direction(path), load_direction(path)
    assert (found.site, found.metadata) == ("attn_out", {"token": "last"})
    assert all(torch.equal(found.layer(layer), expected.layer(layer)) for layer in (2, 3))
    assert_same_lines(found, vectors([2, 3]))


def test_site_and_offset_of_bakes_own_file_can_be_overridden(tmp_path):
    path = tmp_path / "d.safetensors"
    save_file({"direction.2": torch.ones(8)}, path, metadata={"site": "attn_out"})
    found = read_direction(path, layer_offset=-1, site="attn_in")
    assert (list(found.vectors), found.site) == ([1], "attn_in")
    assert "moved by -1, as asked" in found.metadata["understood"]
    with pytest.raises(BakeError, match="unknown site 'somewhere'"):
        read_direction(path, site="somewhere")


def test_layers_that_an_offset_puts_before_the_first_are_left_out_and_said(tmp_path):
    np.save(tmp_path / "hidden_states.npy", np.ones((4, 8)))
    found = read_direction(tmp_path / "hidden_states.npy", layer_offset=-1)
    assert sorted(found.vectors) == [0, 1, 2]
    assert "1 left out, before layer 0" in found.metadata["understood"]
    with pytest.raises(DirectionError, match=r"--layer-offset -9 leaves no layer; .* 0 to 3"):
        read_direction(tmp_path / "hidden_states.npy", layer_offset=-9)


@pytest.mark.parametrize(
    ("scale", "words"), [(1.0, "; unit length;"), (3.0, "; length 3;"), (0.5, "; length 0.5;")]
)
def test_length_is_told(tmp_path, scale, words):
    np.save(tmp_path / "v.npy", np.eye(8)[0] * scale)
    assert words in read_direction(tmp_path / "v.npy").metadata["understood"]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (12, 12),
        ("12", 12),
        ("layer_12", 12),
        ("layer.12", 12),
        ("layers.12", 12),
        ("direction.12", 12),
        ("model.layers.12", 12),
        ("blocks.12", 12),
        ("h.12", 12),
        (-1, None),
        (True, None),
        ("vector", None),
        ("layer_12_extra", None),
        ("1" * 5000, None),
        (None, None),
    ],
)
def test_layer_numbers_in_names(name, layer):
    assert layer_number(name) == layer


def test_layers_are_named_shortly():
    assert name_layers({None: 0}) == "all layers"
    assert name_layers({3: 0}) == "layer 3"
    assert name_layers({3: 0, 4: 0, 5: 0}) == "layers 3 to 5"
    assert name_layers({2: 0, 9: 0, 5: 0}) == "layers 2, 5, 9"
    assert name_layers(dict.fromkeys(range(0, 60, 2))).endswith("20, 22 and 18 more")


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(DirectionError, match=r"no direction file .*nowhere\.gguf"):
        read_direction(tmp_path / "nowhere.gguf")
    with pytest.raises(DirectionError, match=r"holds no layer_N\.json"):
        read_direction(tmp_path)


# The model it is for.


def test_wrong_width_names_both_numbers(tmp_path):
    np.save(tmp_path / "v.npy", np.ones(4096))
    found = read_direction(tmp_path / "v.npy")
    with pytest.raises(DirectionError, match=r"is 4096 wide .* is 2560; .*another model"):
        fit_direction(found, tmp_path / "v.npy", hidden_size=2560, layer_count=4)


@pytest.mark.parametrize(("last", "words"), [(6, "--layer-offset"), (9, "found on this model")])
def test_layer_that_the_model_lacks_is_refused(last, words):
    direction = Direction(vectors([2, last]), "mlp_out")
    direction.check_layers(last + 1)
    with pytest.raises(
        DirectionError, match=f"layer {last} and the model has layers 0 to 5; .*{words}"
    ):
        direction.check_layers(6)


def test_assumed_site_is_announced(tmp_path):
    named, unnamed = tmp_path / "named.safetensors", tmp_path / "unnamed.safetensors"
    save_file({"direction": torch.ones(8)}, named, metadata={"site": "mlp_out"})
    save_file({"direction": torch.ones(8)}, unnamed)
    fit = {"hidden_size": 8, "layer_count": 2}
    assert fit_direction(read_direction(named), named, **fit)[1] == []
    assert (
        "names no site; mlp_out is assumed"
        in fit_direction(read_direction(unnamed), unnamed, **fit)[1][0]
    )


# Python objects.


@pytest.mark.parametrize(
    ("layer_type", "site"),
    [("decoder_block", "mlp_out"), ("self_attn", "attn_out"), ("input_layernorm", "attn_in")],
)
def test_steering_vectors_object(layer_type, site):
    given = vectors([1, 4])
    found = read_direction(SteeringVector(given, layer_type))
    assert_same_lines(found, given)
    assert found.site == site
    assert "steering-vectors SteeringVector" in found.metadata["understood"]


def test_objects_that_are_no_direction_are_refused():
    with pytest.raises(DirectionError, match="layer type 'lm_head'; bake knows decoder_block"):
        read_object(SteeringVector(vectors([1]), "lm_head"))
    with pytest.raises(DirectionError, match=r"int64 values|is a str"):
        read_object({1: "text"}).to_direction("x")
    with pytest.raises(DirectionError):
        read_object(object())


def test_mappings_tensors_arrays_and_directions():
    assert_same_lines(read_direction(vectors([2, 5])), vectors([2, 5]))
    assert_same_lines(read_direction(torch.ones(8)), {None: torch.ones(8)})
    assert sorted(read_direction(np.ones((3, 8))).vectors) == [0, 1, 2]
    direction = Direction({None: torch.ones(8)}, "mlp_out")
    assert read_direction(direction) is direction
    assert read_direction(direction, site="attn_out").site == "attn_out"


def test_object_becomes_a_file_that_keeps_lengths_and_story_and_goes_away():
    given = vectors([1, 4])
    with given_as_file(SteeringVector(given)) as path:
        stored = load_file(path)
        torch.testing.assert_close(stored["direction.4"], given[4])
        found = read_direction(path)
    assert_same_lines(found, given)
    assert "SteeringVector" in found.metadata["understood"]
    with pytest.raises(DirectionError, match="no direction file"):
        read_direction(path)
    with given_as_file("x.npy") as path:
        assert path == "x.npy"


# Through the pipeline.


def test_own_length_takes_the_place_of_a_law():
    push = compute_push(
        {2: 10.0, 3: 10.0},
        {2: torch.eye(8)[0], 3: torch.eye(8)[1]},
        hidden_size=8,
        multiplier=-2.0,
        law=OWN_LENGTH_LAW,
        given={2: 3.0, 3: 0.5},
    )
    assert push.law == OWN_LENGTH_LAW
    assert [entry.coefficient for entry in push.layers] == [-6.0, -1.0]
    assert push.to_dict()["law"] == "own-length"


def test_export_of_a_control_vector_keeps_its_scale(llama, prompts_file, tmp_path, capsys):
    given = vectors(range(1, LAYERS), HIDDEN, scale=0.2)
    path = tmp_path / "v.gguf"
    path.write_bytes(write_gguf(given, "llama"))
    options = {"direction": path, "prompts": prompts_file, "keep_scale": True, "multiplier": 2.0}
    result = api.export(str(llama), output=tmp_path / "out", **options)
    assert "understood as GGUF control vector for llama" in capsys.readouterr().err
    for entry in result.push.layers:
        assert entry.coefficient == pytest.approx(2.0 * float(given[entry.layer].norm()))
        assert entry.coefficient != pytest.approx(2.0 * entry.activation_norm / HIDDEN**0.5)
        torch.testing.assert_close(result.push.vectors[entry.layer], 2.0 * given[entry.layer])
    recorded = json.loads((tmp_path / "out" / "bake.json").read_text())
    assert recorded["law"] == "own-length"
    assert recorded["direction"]["metadata"]["format"] == "GGUF control vector for llama"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "α_l = m·‖v_l‖" in card
    assert "read from another tool's file: GGUF control vector" in card


def test_object_reaches_the_pipeline_as_a_direction(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "bake.api.baking.run_export",
        lambda recipe: seen.append(read_directions(recipe)[0].direction),
    )
    given = vectors([1, 4])
    for direction in (SteeringVector(given), given, read_direction(given)):
        api.export("model", direction=direction, output=tmp_path / "out", keep_scale=True)
    assert len(seen) == 3
    for found in seen:
        assert_same_lines(found, given)
    monkeypatch.setattr("bake.api.baking.estimate_cost", read_directions)
    (found,) = api.estimate("model", direction=SteeringVector(given))
    assert_same_lines(found.direction, given)


def test_band_beyond_the_layers_of_the_file_is_refused(llama, tmp_path):
    torch.save(vectors([1, 2], HIDDEN), tmp_path / "v.pt")
    with pytest.raises(
        DirectionError, match=r"no vector for layer 3; it has 1, 2, .* --band 17:50"
    ):
        api.export(str(llama), direction=tmp_path / "v.pt", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_scale": True, "pairs": "p.jsonl"}, "--keep-scale is about a given direction"),
        ({"layer_offset": 0, "pairs": "p.jsonl"}, "--layer-offset is about a given direction"),
        ({"direction_site": "mlp_in", "pairs": "p"}, "--direction-site is about a given direction"),
        ({"direction_site": "nowhere", "direction": "d"}, "unknown direction site 'nowhere'"),
        ({"keep_scale": True, "direction": "d", "coefficients": "1=1"}, "one of --keep-scale and"),
        ({"keep_scale": True, "direction": "d", "law": "norm"}, "leave --law norm out"),
        ({"keep_scale": True, "direction": "d", "convert_site": True}, "no length of its own"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(BakeError, match=message):
        Recipe("m", "o", **options).check()
