"""GGUF control vectors: read as llama.cpp reads them, written as it expects them."""

import struct

import gguf
import numpy as np
import pytest
import torch

from bake.directions.formats import read_direction
from bake.directions.formats.gguf_reader import parse_gguf, read_gguf
from bake.directions.formats.gguf_writer import write_gguf
from bake.errors import DirectionError


def rows(layers, width=8):
    generator = torch.Generator().manual_seed(7)
    return {layer: torch.randn(width, generator=generator) for layer in layers}


def make(path, tensors, *, architecture="controlvector", count=("uint32", None), hint="llama"):
    """Write a file with the gguf package, as repeng does."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    kind, value = count
    number = len(tensors) if value is None else value
    (writer.add_uint32 if kind == "uint32" else writer.add_int32)(
        "controlvector.layer_count", number
    )
    writer.add_array("general.tags", ["one", "two"])
    writer.add_array("numbers", [1, 2, 3])
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path):
    with pytest.raises(DirectionError) as caught:
        read_direction(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_number_is_the_layer_to_whose_output_llama_cpp_adds_it(tmp_path):
    given = rows([3, 2, 1])
    tensors = {f"direction.{layer}": vector for layer, vector in given.items()}
    found = read_gguf(make(tmp_path / "v.gguf", tensors))
    assert list(found.vectors) == [1, 2, 3]
    assert all(torch.equal(found.vectors[layer], given[layer]) for layer in given)
    assert (found.site, found.metadata) == ("mlp_out", {"model_hint": "llama"})
    assert found.notes == ["N taken as the 0-based layer to whose output llama.cpp adds it"]


def test_offset_moves_the_layers(tmp_path):
    path = make(tmp_path / "v.gguf", {f"direction.{i}": rows([i])[i] for i in (1, 2)})
    assert sorted(read_direction(path).vectors) == [1, 2]
    assert sorted(read_direction(path, layer_offset=-1).vectors) == [0, 1]


@pytest.mark.parametrize(
    ("layers", "count", "words"),
    [
        ([1, 2, 3], ("int32", None), "looks like cvector-generator's, found one layer before"),
        ([3, 2, 1], ("int32", None), None),
        ([0, 1, 2], ("uint32", None), "llama.cpp would refuse direction.0"),
        ([1, 2], ("uint32", 32), "its layer_count says 32"),
    ],
)
def test_what_speaks_for_another_numbering_is_said(tmp_path, layers, count, words):
    tensors = {f"direction.{layer}": torch.ones(8) for layer in layers}
    notes = read_gguf(make(tmp_path / "v.gguf", tensors, count=count)).notes[1:]
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(tmp_path, dtype):
    values = np.arange(1, 9, dtype=dtype)
    found = read_gguf(make(tmp_path / "v.gguf", {"direction.1": values})).vectors[1]
    assert found.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (
            {"direction.1": torch.ones(8)},
            {"architecture": "llama"},
            "'llama' and no control vector",
        ),
        ({"blk.0.ffn_up.weight": torch.ones(8)}, {}, "a control vector's are direction.N"),
        ({"direction.x": torch.ones(8)}, {}, "a control vector's are direction.N"),
        ({"direction.1": torch.ones(8), "direction.2": torch.ones(9)}, {}, r"widths: \[8, 9\]"),
        ({"direction.1": torch.ones(2, 8)}, {}, r"dimensions \[8, 2\]; a direction is one vector"),
        ({"direction.1": torch.zeros(8)}, {}, "direction.1 is all zeros"),
        ({"direction.1": torch.full((8,), torch.nan)}, {}, "direction.1 holds NaN"),
        ({"direction.1": torch.ones(8).int()}, {}, "quantized or of integers"),
        ({}, {}, "holds no tensor"),
    ],
)
def test_unusable_files_are_refused(tmp_path, tensors, options, message):
    path = make(tmp_path / "v.gguf", tensors, **options)
    with pytest.raises(DirectionError, match=message):
        read_direction(path)
    refused(path)


def test_written_file_is_what_llama_cpp_loads(tmp_path):
    """Names, types, dimensions and keys, as common_control_vector_load_one asks for them."""
    given = rows([1, 2, 5])
    path = tmp_path / "v.gguf"
    path.write_bytes(write_gguf(given, "qwen2"))
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen2"
    assert reader.get_field("controlvector.layer_count").contents() == 3
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{i}" for i in (1, 2, 5)]
    for tensor, vector in zip(reader.tensors, given.values(), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.shape.tolist() == [8]
        assert tensor.data.tolist() == vector.tolist()
    assert write_gguf(given, "qwen2") == path.read_bytes()
    with pytest.raises(DirectionError, match=r"llama\.cpp takes none for 0"):
        write_gguf(rows([0, 1]), "llama")


def header(*parts):
    return b"GGUF" + b"".join(parts)


U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
KEY = U64(1) + b"k"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + bytes(64),
        header(U32(3)),
        header(U32(1), U64(0), U64(0)),
        header(struct.pack(">I", 3), bytes(64)),
        header(U32(3), U64(2**62), U64(0)),
        header(U32(3), U64(1), U64(0)),
        header(U32(3), U64(0), U64(2**62)),
        header(U32(3), U64(0), U64(1), U64(2**62)),
        header(U32(3), U64(0), U64(1), KEY, U32(99)),
        header(U32(3), U64(0), U64(1), KEY, U32(9), U32(4), U64(2**62)),
        header(U32(3), U64(0), U64(1), KEY, U32(9), U32(8), U64(2**62)),
        header(U32(3), U64(0), U64(1), KEY, U32(9), U32(9), U64(2**62)),
        header(U32(3), U64(0), U64(1), U64(1), b"\xff", U32(4), U32(4)),
        header(U32(3), U64(1), U64(0), KEY, U32(2**31)),
        header(U32(3), U64(2), U64(0), *[KEY, U32(0), U32(0), U64(0)] * 2),
        header(U32(3), U64(0), U64(1), U64(17), b"general.alignment", U32(4), U32(0)),
    ],
)
def test_lying_headers_are_refused(tmp_path, content):
    path = tmp_path / "v.gguf"
    path.write_bytes(content)
    assert "no sound GGUF file" in refused(path)


def test_tensor_outside_the_file_is_refused(tmp_path):
    path = make(tmp_path / "v.gguf", {"direction.1": torch.ones(8)})
    assert read_direction(path).hidden_size == 8
    content = path.read_bytes()
    for old, new in ((U64(8) + U32(0) + U64(0), U64(2**40) + U32(0) + U64(0)),):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        assert "is not inside it" in refused(path)
    path.write_bytes(content[:-8])
    assert "is not inside it" in refused(path)


def test_alignment_of_the_file_is_kept_to(tmp_path):
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_custom_alignment(256)
    writer.add_tensor("direction.4", np.arange(1, 9, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert parse_gguf(path).tensors[0].start % 256 == 0
    assert read_gguf(path).vectors[4].tolist() == list(range(1, 9))
