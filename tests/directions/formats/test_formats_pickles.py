"""PyTorch's files: what tools put into them, and that no code in them ever runs."""

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import pytest
import torch

from bake.directions.formats import read_direction
from bake.directions.formats.pickles import read_pt
from bake.errors import DirectionError

V = torch.arange(1.0, 9)


def save(path, value, **options):
    torch.save(value, path, **options)
    return path


def refused(path):
    with pytest.raises(DirectionError) as caught:
        read_direction(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (V, [None]),
        (torch.nn.Parameter(V), [None]),
        (torch.stack([V, V]), [0, 1]),
        ([V, V, V], [0, 1, 2]),
        ((V, V), [0, 1]),
        ({3: V, 7: V}, [3, 7]),
        ({"3": V, "layer_7": V}, [3, 7]),
        (OrderedDict({3: V.half(), 7: V.bfloat16()}), [3, 7]),
        ({"vectors": {3: V}, "model": "a/b"}, [3]),
        ({"layer_activations": {4: V}, "layer_type": "decoder_block"}, [4]),
        ({"directions": [V, V]}, [0, 1]),
        ({"vector": V, "layer": 5}, [5]),
        ({"vector": V, "scale": 2.0}, [None]),
        ({3: V.reshape(1, 1, 8)}, [3]),
    ],
)
def test_what_tools_save(tmp_path, value, layers):
    found = read_pt(save(tmp_path / "v.pt", value)).vectors
    assert list(found) == layers
    assert all(vector.float().tolist() == V.tolist() for vector in found.values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "holds a str; save a tensor"),
        ({}, "holds no array"),
        ([V, "text"], "a list whose entry 1 is a 'str'"),
        ({"a": V, "b": V}, "names an array 'a', which is no layer"),
        ({3: V, 4: V[:3]}, r"different widths: \[3, 8\]"),
        (V.long(), "int64 values"),
        (V.to(torch.complex64), "complex64 values"),
        (torch.zeros(8), "all zeros"),
        (torch.ones(8) * torch.inf, "NaN or infinite"),
        (V.to_sparse(), "sparse, quantized or absent"),
        (torch.empty(8, device="meta"), "sparse, quantized or absent"),
        (torch.ones(1).expand(2**40), "more than the file holds"),
        (torch.ones(()).expand(2**20, 2**20), "no \\(layers, hidden_size\\)"),
    ],
)
def test_what_is_refused(tmp_path, value, message):
    path = save(tmp_path / "v.pt", value)
    with pytest.raises(DirectionError, match=message):
        read_direction(path)
    refused(path)


class Payload:
    """A pickle of this runs code where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", [lambda p: p, lambda p: {3: V, "x": p}, lambda p: [p]])
def test_code_is_never_run(tmp_path, container):
    mark = tmp_path / "mark"
    path = save(tmp_path / "v.pt", container(Payload(mark)))
    assert "holds pickled code" in refused(path)
    assert "save the tensors alone" in refused(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # So it would have.


def test_steering_vectors_pickle_says_how_to_save_it(tmp_path, monkeypatch):
    module = types.ModuleType("steering_vectors.steering_vector")
    source = "class SteeringVector:\n    def __init__(self, a): self.layer_activations = a\n"
    exec(source, vars(module))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
        patched.setitem(sys.modules, module.__name__, module)
        path = save(tmp_path / "v.pt", module.SteeringVector({3: V}))
    assert "torch.save(steering_vector.layer_activations, FILE)" in refused(path)


def test_containers_that_contain_themselves_do_not_hang(tmp_path):
    loop = {}
    loop["vectors"] = loop
    assert refused(save(tmp_path / "v.pt", loop))
    wide = [[V] * 3000] * 3000  # Nine million references in a file of a few kilobytes.
    assert "entry 0 is a 'list'" in refused(save(tmp_path / "v.pt", wide))


def test_old_and_broken_files_are_refused(tmp_path):
    old = save(tmp_path / "v.pt", V, _use_new_zipfile_serialization=False)
    assert "PyTorch 1.6" in refused(old)
    for content in (b"", b"PK", b"PK\3\4 and no more", pickle.dumps([1.0])):
        old.write_bytes(content)
        refused(old)


def rewrite(path, change):
    """Write the archive again with its pickle changed; checksums and sizes are right again."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_pickle_that_lies_about_its_storage_is_refused(tmp_path):
    path = save(tmp_path / "v.pt", V)
    rewrite(path, lambda data: data)
    assert read_direction(path).hidden_size == 8
    rewrite(path, lambda data: data.replace(b"K\x08tq\x05Q", b"J\x00\x00\x00\x40tq\x05Q"))
    refused(path)


def test_bit_that_flipped_is_found_by_the_checksum(tmp_path):
    path = save(tmp_path / "v.pt", V)
    content = path.read_bytes()
    at = content.index(V.numpy().tobytes())
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    assert "a checksum does not match" in refused(path)
