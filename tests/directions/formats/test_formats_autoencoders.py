"""Rows of an autoencoder's decoder: which axis is which, and that only what is needed is read."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bake.directions.formats import fit_direction, is_decoder, read_direction
from bake.directions.formats.autoencoders import choose_axis, parse_reference
from bake.errors import DirectionError

FEATURES, WIDTH = 24, 8
W = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture(params=["sae.safetensors", "sae.npz", "sae.pt"])
def files(request, tmp_path):
    """Return a function that writes a decoder and returns the file's path."""

    def make(matrix, name="W_dec"):
        path = tmp_path / request.param
        if path.suffix == ".npz":
            np.savez(path, **{name: matrix.numpy(), "W_enc": np.ones((8, 24))})
        elif path.suffix == ".pt":
            torch.save({name: matrix, "W_enc": torch.ones(8, 24)}, path)
        else:
            save_file({name: matrix.contiguous(), "W_enc": torch.ones(8, 24)}, path)
        return path

    return make


@pytest.mark.parametrize("index", [0, 5, FEATURES - 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_axis_of_the_hidden_size_is_the_vector(files, index, transposed):
    path = files(W.T.contiguous() if transposed else W)
    reference = f"{path}:W_dec[{index}]"
    assert is_decoder(reference)
    found = read_direction(reference, hidden_size=WIDTH)
    torch.testing.assert_close(found.layer(3), W[index] / W[index].norm())
    assert found.lengths[None] == pytest.approx(float(W[index].norm()))
    layout = "(hidden_size, features)" if transposed else "(features, hidden_size)"
    assert f"feature {index} of W_dec" in found.metadata["understood"]
    assert layout in found.metadata["understood"]


def test_pipeline_reads_it_again_when_the_model_is_known(files):
    reference = f"{files(W[:5].contiguous())}:W_dec[3]"
    early = read_direction(reference)
    assert early.hidden_size == 5  # Fewer features than dimensions: the model is not known yet.
    found, notes = fit_direction(early, reference, hidden_size=WIDTH, layer_count=4)
    torch.testing.assert_close(found.layer(0), W[3] / W[3].norm())
    assert "read as (features, hidden_size)" in notes[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_without_a_model_the_shorter_axis_is_the_vector(files, transposed):
    reference = f"{files(W.T.contiguous() if transposed else W)}:W_dec[5]"
    torch.testing.assert_close(read_direction(reference).layer(0), W[5] / W[5].norm())


def test_square_decoders_take_rows():
    assert choose_axis((8, 8), 3, 8, "x")
    assert choose_axis((8, 8), 3, None, "x")


@pytest.mark.parametrize(
    ("reference", "hidden", "message"),
    [
        ("W_dec[24]", WIDTH, "features 0 to 23; there is no 24"),
        ("W_dec[99]", None, "features 0 to 23; there is no 99"),
        ("W_dec[0]", 16, r"shape \(24, 8\) and the model's hidden size is 16, which is neither"),
        ("decoder[0]", WIDTH, "holds no tensor decoder; it has"),
    ],
)
def test_wrong_references_are_refused(files, reference, hidden, message):
    with pytest.raises(DirectionError, match=message):
        read_direction(f"{files(W)}:{reference}", hidden_size=hidden)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(24, 8), "all zeros"),
        (torch.ones(24, 8).int(), "int32 values"),
        (torch.ones(24, 8) * torch.nan, "NaN or infinite"),
        (torch.ones(2, 24, 8), "a decoder is"),
    ],
)
def test_unusable_decoders_are_refused(files, matrix, message):
    with pytest.raises(DirectionError, match=message):
        read_direction(f"{files(matrix)}:W_dec[1]", hidden_size=WIDTH)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DirectionError, match=r"no file .*FILE:TENSOR\[INDEX\]"):
        read_direction(f"{tmp_path}/none.safetensors:W_dec[0]")
    (tmp_path / "sae.safetensors").write_bytes(b"no header")
    with pytest.raises(DirectionError, match="not a sound safetensors file"):
        read_direction(f"{tmp_path}/sae.safetensors:W_dec[0]")


def test_what_is_a_reference(tmp_path):
    assert parse_reference("a/b.pt:W_dec[12]").index == 12
    assert parse_reference("C:/b.pt:decoder.weight[0]").tensor == "decoder.weight"
    for text in ("a.pt", "a.pt:W_dec", "a.pt[3]", "a.pt:W_dec[-1]", "a.pt:W_dec[x]"):
        assert parse_reference(text) is None
    path = tmp_path / "odd.pt:W_dec[1]"
    torch.save(torch.ones(8), path)
    assert not is_decoder(str(path))  # A file of that very name.


def test_row_of_a_safetensors_file_is_read_alone(tmp_path, monkeypatch):
    path = tmp_path / "sae.safetensors"
    save_file({"W_dec": W}, path)
    read = []
    from bake.directions.formats import autoencoders

    original = autoencoders.read_range
    monkeypatch.setattr(
        autoencoders, "read_range", lambda p, a, b: read.append(b - a) or original(p, a, b)
    )
    read_direction(f"{path}:W_dec[7]", hidden_size=WIDTH)
    assert read == [WIDTH * 4]
