"""Opening a checkpoint: what is read, what is carried over, and what is wrong with broken ones."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub, run_client
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bake.checkpoint.carried_files import find_companions
from bake.checkpoint.checkpoint import open_checkpoint
from bake.errors import CheckpointError
from bake.io.hashing import hash_files
from bake.io.safetensors import (
    DTYPES,
    TensorSpec,
    decode_tensor,
    encode_header,
    encode_tensor,
    read_header,
    spec_of,
)

ROOT = Path(__file__).parents[2]


def build_tiny_llama(directory, *, dtype="float32", sharded=False, tied=False):
    """A two-layer Llama of random weights (hidden size 16), as save_pretrained leaves it.

    The stored dtype comes from a reload: `.to(bfloat16)` on a built model would round its rotary
    buffers too.
    """
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    source = directory.with_name(directory.name + "-float32")
    LlamaForCausalLM(config).save_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(directory, max_shard_size="6KB" if sharded else "5GB")
    return directory


@pytest.fixture
def single(tmp_path):
    return build_tiny_llama(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path):
    return build_tiny_llama(tmp_path / "sharded", sharded=True)


def write_raw(path, header, data=b""):
    """A safetensors file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def one_line(excinfo, *parts):
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_every_tensor_is_found_and_read_as_safetensors_reads_it(tmp_path, dtype, is_sharded):
    directory = build_tiny_llama(tmp_path / "model", dtype=dtype, sharded=is_sharded)
    checkpoint = open_checkpoint(str(directory))
    files = sorted(directory.glob("*.safetensors"))
    assert (len(files) > 2) == is_sharded  # otherwise the sharded case tests nothing
    assert checkpoint.shards == tuple(path.name for path in files)
    expected = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype == getattr(torch, dtype)
        assert found.shape == checkpoint.tensors[name].shape == tensor.shape
        assert torch.equal(found, tensor)
        assert checkpoint.read_bytes(name) == bytes(encode_tensor(tensor))
    assert checkpoint.size == sum(t.numel() * t.element_size() for t in expected.values())
    assert checkpoint.revision is None
    assert checkpoint.model_id == "model"
    assert checkpoint.config["model_type"] == "llama"
    assert (checkpoint.index_metadata is not None) == is_sharded
    assert str(tmp_path) not in json.dumps(checkpoint.to_dict())


def test_rows_are_a_slice_and_only_their_bytes_are_read(single, monkeypatch):
    checkpoint = open_checkpoint(str(single))
    name = "model.embed_tokens.weight"
    whole = checkpoint.read(name)
    ranges = []
    real = __import__("bake.checkpoint.checkpoint", fromlist=["read_range"]).read_range
    monkeypatch.setattr(
        "bake.checkpoint.checkpoint.read_range",
        lambda path, start, end: ranges.append(end - start) or real(path, start, end),
    )
    assert torch.equal(checkpoint.read_rows(name, 3, 7), whole[3:7])
    assert ranges == [4 * 16 * 4]
    assert checkpoint.read_rows(name, 5, 5).shape == (0, 16)
    for start, stop in [(-1, 2), (3, 2), (0, 65)]:
        with pytest.raises(CheckpointError, match="outside tensor"):
            checkpoint.read_rows(name, start, stop)
    with pytest.raises(CheckpointError, match=r"no tensor model\.nothing"):
        checkpoint.read("model.nothing")


@pytest.mark.parametrize(
    "dtype", [name for bits, name in DTYPES.values() if name and hasattr(torch, name)]
)
def test_every_dtype_goes_out_and_comes_back(tmp_path, dtype):
    whole_bytes = torch.arange(48, dtype=torch.uint8)
    if dtype == "bool":
        whole_bytes %= 2
    tensor = whole_bytes.view(getattr(torch, dtype)).reshape(2, -1)
    spec = spec_of("t", tensor)
    path = tmp_path / "own.safetensors"
    path.write_bytes(encode_header([spec], {}) + bytes(encode_tensor(tensor)))
    entry = read_header(path, "own.safetensors").tensors[0]
    assert (entry.dtype, entry.shape) == (spec.dtype, tuple(tensor.shape))
    data = bytearray(path.read_bytes()[entry.start : entry.end])
    again = decode_tensor(data, entry.dtype, entry.shape)
    assert again.dtype == tensor.dtype
    assert bytes(encode_tensor(again)) == whole_bytes.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int64", "bool"])
def test_the_reader_and_safetensors_agree_in_both_directions(tmp_path, dtype):
    tensors = {
        "scalar": torch.tensor(1.0).to(getattr(torch, dtype)),
        "matrix": torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(getattr(torch, dtype)),
        "nothing": torch.zeros(0, 3).to(getattr(torch, dtype)),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "theirs.safetensors", "theirs")
    assert header.metadata == {"format": "pt"}
    assert {entry.name: entry.shape for entry in header.tensors} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    data = b"".join(bytes(encode_tensor(tensor)) for tensor in tensors.values())
    (tmp_path / "ours.safetensors").write_bytes(encode_header(specs, {"format": "pt"}) + data)
    again = load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        assert again[name].shape == tensor.shape
        assert bytes(encode_tensor(again[name])) == bytes(encode_tensor(tensor))


def test_a_dtype_without_a_torch_counterpart_is_kept_but_not_decoded(single):
    spec = TensorSpec("packed", "F4", (2, 4))
    (single / "model.safetensors").write_bytes(encode_header([spec], {}) + b"\x12\x34\x56\x78")
    checkpoint = open_checkpoint(str(single))
    assert checkpoint.read_bytes("packed") == b"\x12\x34\x56\x78"
    with pytest.raises(CheckpointError, match="dtype F4 has no counterpart"):
        checkpoint.read("packed")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"a": ENTRY}, b"\0" * 7, "truncated"),
        ({"a": ENTRY}, b"\0" * 9, "foreign bytes"),
        ({"a": {**ENTRY, "shape": [3]}}, b"\0" * 8, "needs 12 bytes and has 8"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"\0" * 8, "proper dtype, shape"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, b"\0" * 8, "proper dtype, shape"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"\0" * 8, "needs 8 bytes and has -8"),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"\0" * 8, "proper dtype, shape"),
        ({"a": {**ENTRY, "dtype": "F99"}}, b"\0" * 8, "dtype 'F99', which bake does not know"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, b"\0" * 8, "which bake does not know"),
        ({"a": {**ENTRY, "dtype": "F4", "shape": [15]}}, b"\0" * 8, "needs 7.5 bytes"),
        ({"a": [1]}, b"", "proper dtype, shape"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12, "b overlaps"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, b"\0" * 17, "b follows a hole"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12, "a follows a hole"),
        ({"a": {**ENTRY, "shape": [2**70]}}, b"\0" * 8, "needs"),
        ({"__metadata__": {"n": 1}, "a": ENTRY}, b"\0" * 8, "__metadata__ is not a map of strings"),
        (b'{"a": 1, "a": 2}', b"", "has the key 'a' twice"),
        (b"[1]", b"", "not a JSON object"),
        (b"{nonsense", b"", "not JSON"),
        (b"\xff\xfe", b"", "not UTF-8 text"),
        (b"[" * 200_000, b"", "nested more than 64 levels deep"),
    ],
)
def test_a_malformed_header_is_one_line_that_names_the_file(single, header, data, problem):
    path = single / "model.safetensors"
    open_checkpoint(str(single))
    write_raw(path, header, data)
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(single))
    one_line(excinfo, str(path), problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has 0 bytes"),
        (b"\x01\x02\x03", "has 3 bytes"),
        (struct.pack("<Q", 100_000_001) + b"{}", "claims 100000001 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
        (struct.pack("<Q", 50) + b"{}", "truncated inside its header"),
    ],
)
def test_a_file_that_is_no_safetensors_file(single, content, problem):
    path = single / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(single))
    one_line(excinfo, str(path), problem, "download or save it again")


def change_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    return index


@pytest.mark.parametrize(
    "outside", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", ""]
)
def test_an_index_cannot_lead_out_of_the_directory(sharded, outside):
    change_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": outside}))
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(sharded))
    one_line(excinfo, "model.safetensors.index.json", repr(outside), "do not trust it")


def test_an_index_that_names_a_missing_shard(sharded):
    shard = open_checkpoint(str(sharded)).shards[1]
    (sharded / shard).unlink()
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(sharded))
    one_line(excinfo, shard, "not there", "download")


def test_an_index_that_puts_a_tensor_where_it_is_not(sharded):
    shard = open_checkpoint(str(sharded)).shards[0]
    change_index(sharded, lambda index: index["weight_map"].update({"ghost.weight": shard}))
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(sharded))
    one_line(excinfo, "ghost.weight", shard, "does not hold it")


@pytest.mark.parametrize(
    "broken", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\ufeff{}"]
)
def test_an_index_that_is_no_index(sharded, broken):
    path = sharded / "model.safetensors.index.json"
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(sharded))
    one_line(excinfo, str(path))


def test_an_index_without_metadata_is_fine(sharded):
    change_index(sharded, lambda index: index.pop("metadata"))
    assert open_checkpoint(str(sharded)).index_metadata == {}


def test_a_tensor_in_two_shards_is_refused(sharded):
    checkpoint = open_checkpoint(str(sharded))
    name = "lm_head.weight"
    other = next(file for file in checkpoint.shards if file != checkpoint.tensors[name].file)
    tensors = load_file(sharded / other)
    save_file({**tensors, name: checkpoint.read(name)}, sharded / other)
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(sharded))
    one_line(excinfo, name, "twice", other, checkpoint.tensors[name].file)


def test_a_tensor_that_only_its_shard_knows_counts_as_transformers_counts_it(sharded):
    name = "model.layers.1.mlp.down_proj.weight"
    change_index(sharded, lambda index: index["weight_map"].pop(name))
    assert name in open_checkpoint(str(sharded)).tensors
    _, report = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not report["missing_keys"]


def test_a_single_file_beats_an_index_as_in_transformers(sharded):
    checkpoint = open_checkpoint(str(sharded))
    tensors = {name: torch.zeros_like(checkpoint.read(name)) for name in checkpoint.tensors}
    save_file(tensors, sharded / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(sharded)).shards == ("model.safetensors",)
    model = AutoModelForCausalLM.from_pretrained(sharded)
    assert not model.lm_head.weight.any()


def test_weights_that_the_config_names_come_first(single):
    (single / "model.safetensors").rename(single / "other.safetensors")
    config = json.loads((single / "config.json").read_text())
    path = single / "config.json"
    path.write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert open_checkpoint(str(single)).shards == ("other.safetensors",)
    for name, problem in [
        ("gone.safetensors", "not there"),
        ("../x.safetensors", "do not trust it"),
        ("model.bin", "does not end in"),
    ]:
        path.write_text(json.dumps({**config, "transformers_weights": name}))
        with pytest.raises(CheckpointError) as excinfo:
            open_checkpoint(str(single))
        one_line(excinfo, str(path), name, problem)


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, single, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = [
        ("./nowhere", "does not exist"),
        ("/no/where", "does not exist"),
        ("~/no-such-directory-here", "does not exist"),
        ("~no-such-user/model", "cannot be opened"),
        ("long" * 100, "cannot be opened"),
        ("three/parts/deep", "does not exist"),
        ("", "does not exist"),
        ("file", "is a file"),
        ("empty", "has no config.json"),
        ("not a hub id!", "neither a directory nor a well-formed Hub id"),
    ]
    for model, problem in cases:
        with pytest.raises(CheckpointError) as excinfo:
            open_checkpoint(model)
        one_line(excinfo, model, problem)
    with pytest.raises(CheckpointError, match="has no revision main"):
        open_checkpoint(str(single), revision="main")
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(single))
    one_line(excinfo, "pytorch_model.bin", "not a sound PyTorch file")
    (single / "pytorch_model.bin").rename(single / "weights.gguf")
    with pytest.raises(CheckpointError) as excinfo:
        open_checkpoint(str(single))
    one_line(excinfo, "weights.gguf", "neither model.safetensors nor pytorch_model.bin")
    for broken in ("{", "[1]"):
        (single / "config.json").write_text(broken)
        with pytest.raises(CheckpointError) as excinfo:
            open_checkpoint(str(single))
        one_line(excinfo, str(single / "config.json"))


CARRIED = [
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE"),
    *("LICENSE.txt", "NOTICE", "USE_POLICY.md", "tekken.json"),
    "additional_chat_templates/tool_use.jinja",
]
LEFT = [
    *("README.md", ".gitattributes", "consolidated.safetensors", "consolidated.00.pth"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "x.gguf"),
    *("tf_model.h5", "flax_model.msgpack", "model.onnx", "params.json", "training_args.bin"),
    *("optimizer.pt", "adapter_model.safetensors", "adapter_config.json", "bake.json"),
    *("original/tokenizer.model", "onnx/config.json", "original/params.json", "figures/a.json"),
    *("model.safetensors.index.json", "direction.safetensors", "originals.safetensors"),
    *("modeling_custom.py", "cache_kernel.cu", "custom_generate/generate.py"),
    *(".cache/huggingface/x.json", "tokenizer.json.incomplete", "diagram.png"),
]


def test_companions_are_everything_but_weights_cards_and_caches(tmp_path):
    for name in [*CARRIED, *LEFT, "config.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert find_companions(tmp_path) == tuple(sorted(CARRIED))


OPEN = """
import json, sys
sys.path.insert(0, {root!r})
from bake.checkpoint.checkpoint import open_checkpoint
from bake.errors import CheckpointError
from bake.io.hashing import hash_files
try:
    checkpoint = open_checkpoint({model!r}, revision={revision!r})
except CheckpointError as error:
    print(json.dumps(str(error)))
else:
    directory = checkpoint.directory
    files = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    known = [checkpoint.known_sha256(shard) for shard in checkpoint.shards]
    print(json.dumps([checkpoint.to_dict(), files, known, directory.name]))
"""


def open_on(hub, tmp_path, model, token=None, revision=None, **environment):
    code = OPEN.format(root=str(ROOT), model=model, revision=revision)
    done = run_client(hub, code, tmp_path, token, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hub_id_fetches_only_what_a_bake_needs(tmp_path, sharded):
    checkpoint = open_checkpoint(str(sharded))
    names = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    files = {name: (sharded / name).read_bytes() for name in [*names, *checkpoint.shards]}
    extra = [name for name in [*CARRIED, *LEFT] if name not in files]
    with LoopbackHub() as hub:
        hub.add_user("ada", token="hf_ada")
        hub.create_repo("ada/base")
        hub.add_files("ada/base", {**files, **{name: name.encode() for name in extra}})
        found, fetched, known, sha = open_on(hub, tmp_path, "ada/base")
        assert (found["id"], found["revision"]) == ("ada/base", sha)
        assert len(sha) == 40
        # The card names the licence; by its config an adapter is known for one.
        assert fetched == sorted({*files, *CARRIED, "README.md", "adapter_config.json"})
        assert found["companions"] == sorted({*CARRIED, "generation_config.json"})
        assert found["tensors"] == len(checkpoint.tensors)
        hashes = hash_files(sharded)
        assert known == [hashes[shard]["sha256"] for shard in checkpoint.shards]
        offline = open_on(hub, tmp_path, "ada/base", HF_HUB_OFFLINE="1")
        assert offline[0] == found
        assert "no revision nope" in open_on(hub, tmp_path, "ada/base", revision="nope")


def test_of_two_copies_on_the_hub_the_single_file_is_fetched(tmp_path, single):
    files = {path.name: path.read_bytes() for path in single.iterdir()}
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    twin = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00001.safetensors": b"another copy",
    }
    with LoopbackHub() as hub:
        hub.create_repo("ada/base")
        hub.add_files("ada/base", {**files, **twin})
        _, fetched, _, _ = open_on(hub, tmp_path, "ada/base")
    assert "model.safetensors" in fetched
    assert "model-00001-of-00001.safetensors" not in fetched


def test_what_the_hub_refuses_is_told_with_a_remedy(tmp_path):
    with LoopbackHub() as hub:
        hub.add_user("ada", token="hf_ada")
        hub.create_repo("ada/gated", gated=True)
        hub.add_files("ada/gated", {"config.json": b"{}"})
        hub.create_repo("ada/bin")
        hub.add_files("ada/bin", {"config.json": b"{}", "pytorch_model.bin": b"x"})
        missing = open_on(hub, tmp_path, "ada/missing")
        gated = open_on(hub, tmp_path, "ada/gated")
        offline = open_on(hub, tmp_path, "ada/missing", HF_HUB_OFFLINE="1")
        broken = open_on(hub, tmp_path, "ada/bin")
    assert "no such model" in missing
    assert "hf auth login" in missing
    assert "is gated: accept its terms" in gated
    assert "unset HF_HUB_OFFLINE" in offline
    assert "not a sound PyTorch file" in broken
    unreachable = open_on(hub, tmp_path, "ada/other")  # the Hub is down by now
    assert "cannot be reached" in unreachable
    for message in (missing, gated, offline, broken, unreachable):
        assert "\n" not in message


def test_a_snapshot_in_the_cache_knows_where_it_comes_from(tmp_path, single):
    sha = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--ada--base" / "snapshots" / sha
    snapshot.parent.mkdir(parents=True)
    single.rename(snapshot)
    checkpoint = open_checkpoint(str(snapshot))
    assert (checkpoint.model_id, checkpoint.revision) == ("ada/base", sha)


def test_opening_imports_no_torch(single, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import bake.checkpoint.writer, bake.io.hashing\n"
        "from bake.checkpoint.checkpoint import open_checkpoint\n"
        f"open_checkpoint({str(single)!r})\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
