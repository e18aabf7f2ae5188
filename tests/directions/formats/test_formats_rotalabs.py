"""rotalabs-steer's folders and pairs of files, written here as its `save` methods write them."""

import json

import pytest
import torch

from bake.directions.formats import read_direction
from bake.errors import DirectionError


def save_vector(path, layer, vector, **changes):
    """What SteeringVector.save writes, in rotalabs-steer 1.2."""
    values = {
        "behavior": "refusal",
        "layer_index": layer,
        "model_name": "org/model",
        "extraction_method": "caa",
        "metadata": {"created_at": "2026-01-01T00:00:00"},
        "vector_shape": list(vector.shape),
        **changes,
    }
    path.with_suffix(".json").write_text(json.dumps(values))
    torch.save(vector, path.with_suffix(".pt"))


@pytest.fixture
def folder(tmp_path):
    """What SteeringVectorSet.save writes."""
    root = tmp_path / "refusal"
    root.mkdir()
    for layer in (14, 9):
        save_vector(root / f"layer_{layer}", layer, torch.arange(1.0, 9) + layer)
    listed = {"behavior": "refusal", "layers": [9, 14], "model_name": "org/model"}
    (root / "metadata.json").write_text(json.dumps(listed))
    return root


def test_folder(folder):
    found = read_direction(folder)
    assert list(found.vectors) == [9, 14]
    expected = torch.arange(1.0, 9) + 14
    torch.testing.assert_close(found.layer(14), expected / expected.norm())
    assert found.site == "mlp_out"
    known = {"model": "org/model", "method": "caa", "behavior": "refusal"}
    assert known.items() <= found.metadata.items()
    assert "rotalabs-steer vectors: 2 vectors of width 8 for layers 9, 14" in str(found.metadata)


@pytest.mark.parametrize("name", ["layer_9.json", "layer_9.pt"])
def test_one_pair_of_files_keeps_its_layer(folder, name):
    assert list(read_direction(folder / name).vectors) == [9]


def test_offset_moves_its_layers(folder):
    assert list(read_direction(folder, layer_offset=1).vectors) == [10, 15]


def test_wrong_width_names_the_model_it_is_for(folder):
    with pytest.raises(DirectionError, match=r"is 8 wide .* is 64; it was found on org/model"):
        read_direction(folder).select([9], 64)


def broken(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(DirectionError) as caught:
        read_direction(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_vectors_of_a_layer_are_refused(folder):
    (folder / "layer_copy.pt").write_bytes((folder / "layer_9.pt").read_bytes())
    message = broken(folder, "layer_copy.json", (folder / "layer_9.json").read_bytes())
    assert "two vectors of layer 9; keep one" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("layer_9.json", b"{", "is not JSON"),
        ("layer_9.json", b"\xff", "is not UTF-8 text"),
        ("layer_9.json", b"[" * 100_000, "cannot be read"),
        ("layer_9.json", b" " * 1_000_001, "more than the 1000000 bytes allowed"),
        ("layer_9.json", b"[]", "is not a JSON object but a JSON array"),
        ("layer_9.json", b"{}", "has no layer_index"),
        ("layer_9.json", b'{"layer_index": -1}', "counts from the end"),
        ("layer_9.pt", b"no archive", "no archive of PyTorch"),
        ("layer_7.json", b'{"layer_index": 7}', "has no layer_7.pt beside it"),
        ("metadata.json", b'{"layers": [9, 14, 20]}', "lists layer 20 and has no layer_20.json"),
    ],
)
def test_broken_files_are_refused(folder, name, content, message):
    assert message in broken(folder, name, content)


def test_matrix_and_dictionary_are_refused(folder):
    for value, message in ((torch.ones(2, 8), "one vector a file"), ({"a": 1}, "and no tensor")):
        torch.save(value, folder / "layer_9.pt")
        with pytest.raises(DirectionError, match=message):
            read_direction(folder)
