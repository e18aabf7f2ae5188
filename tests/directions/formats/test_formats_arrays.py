"""numpy's files: shapes, names, dtypes, and headers that lie."""

import io
import zipfile

import numpy as np
import pytest
import torch

from bake.directions.formats import read_direction
from bake.directions.formats.arrays import read_npy, read_npz, write_npy, write_npz
from bake.errors import DirectionError


def refused(path):
    with pytest.raises(DirectionError) as caught:
        read_direction(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def header(text, version=(1, 0)):
    text = text.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dtypes_and_orders(tmp_path, dtype, order):
    values = np.arange(1, 25).reshape(3, 8)
    np.save(tmp_path / "v.npy", np.asarray(values, dtype=dtype, order=order))
    found = read_npy(tmp_path / "v.npy").vectors
    for row in range(3):
        assert found[row].tolist() == values[row].tolist()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
def test_one_vector_is_for_all_layers(tmp_path, shape):
    np.save(tmp_path / "v.npy", np.arange(1.0, 9).reshape(shape))
    assert list(read_npy(tmp_path / "v.npy").vectors) == [None]


def test_names_of_an_archive(tmp_path):
    np.savez_compressed(tmp_path / "v.npz", **{"layer_10": np.ones(8), "direction.2": np.ones(8)})
    assert list(read_npz(tmp_path / "v.npz").vectors) == [2, 10]
    np.savez(tmp_path / "v.npz", np.ones((3, 8)))
    assert list(read_npz(tmp_path / "v.npz").vectors) == [0, 1, 2]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(8, int), "int64 values; a direction is of real numbers"),
        (np.ones(8, complex), "complex128 values"),
        (np.ones(8, bool), "bool values"),
        (np.array(["text"]), "values; a direction is of real numbers"),
        (np.ones(8, np.longdouble), "values; a direction is of real numbers"),
        (np.zeros((2, 8)), "direction.0 is all zeros"),
        (np.full(8, np.nan), "NaN or infinite"),
        (np.full(8, 1e300), "too large to measure"),
        (np.ones((2, 3, 8)), r"shape \(2, 3, 8\); give one vector"),
        (np.ones((0, 8)), "is empty"),
        (np.float32(1), "is empty"),
        (np.ones(4, [("a", "f4")]), "Python objects or records"),
        (np.array([{}], object), "Python objects or records, which bake never unpickles"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path, array, message):
    path = tmp_path / "v.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(DirectionError, match=message):
        read_direction(path)
    refused(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": np.ones(8), "b": np.ones(8)}, "names an array 'a', which is no layer"),
        ({"layer_1": np.ones(8), "1": np.ones(8)}, "names a layer twice"),
        ({"layer_1": np.ones((2, 8))}, r"shape \(2, 8\); a layer has one vector"),
        ({"layer_1": np.ones(8), "layer_2": np.ones(9)}, r"different widths: \[8, 9\]"),
        ({}, "holds no array"),
    ],
)
def test_unusable_archives_are_refused(tmp_path, names, message):
    np.savez(tmp_path / "v.npz", **names)
    with pytest.raises(DirectionError, match=message):
        read_direction(tmp_path / "v.npz")


def test_lying_headers_are_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "v.npy"
    template = "{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
    for shape in ("(1000000000000,)", "(1000000, 1000000)", "(-8,)", f"({'9' * 400},)"):
        path.write_bytes(header(template.format(shape=shape)) + bytes(32))
        assert "its header says" in refused(path)
    for content in (b"", b"\x93NUMPY", header("[" * 5000), header("{}"), header("{}", (3, 0))):
        path.write_bytes(content)
        assert "no sound numpy file" in refused(path)
    path.write_bytes(header(template.format(shape="(4,)")) + bytes(24))
    assert "bytes after its end" in refused(path)


def test_array_in_an_archive_that_claims_more_than_can_be(tmp_path):
    path, inner = tmp_path / "v.npz", io.BytesIO()
    np.save(inner, np.ones(8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.npy", inner.getvalue())
    content = bytearray(path.read_bytes())
    size = len(inner.getvalue()).to_bytes(4, "little")
    assert content.count(size) == 4  # Twice in the entry, twice in the directory.
    content[:] = content.replace(size, (2**31).to_bytes(4, "little"))
    path.write_bytes(content)
    refused(path)


def test_written_arrays_are_read_back_bit_for_bit(tmp_path):
    rows = {layer: torch.randn(8) for layer in range(3)}
    for name, content in (("v.npy", write_npy(rows)), ("v.npz", write_npz(rows))):
        (tmp_path / name).write_bytes(content)
        found = (read_npy if name == "v.npy" else read_npz)(tmp_path / name).vectors
        assert all(torch.equal(found[layer], rows[layer]) for layer in rows)
    assert write_npz(rows) == write_npz(rows)
    with pytest.raises(DirectionError, match=r"begins at layer 1 or has gaps; write .npz"):
        write_npy({1: rows[1], 2: rows[2]})
