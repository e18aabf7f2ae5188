"""Old PyTorch weights: converted whole, by name, without running what a pickle may hold."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import TinyModel
from loopback_hub import LoopbackHub, run_client
from pickled_models import pickle_weights

from bake.api import export, verify
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.pickled import read_pickled
from bake.errors import CheckpointError, OutputError
from bake.io.hashing import hash_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A place for temporary files that each test sees all of."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_arrives_under_its_name(make_model, tmp_path, dtype, shards, legacy):
    source = make_model(TinyModel(dtype=dtype))
    old = pickle_weights(source, tmp_path / "old", shards, legacy)
    before = hash_files(old)
    found, expected = open_checkpoint(str(old)), open_checkpoint(str(source))
    assert len(found.shards) == shards
    assert set(found.tensors) == set(expected.tensors)
    for name in expected.tensors:
        assert found.tensors[name].shape == expected.tensors[name].shape
        assert found.read_bytes(name) == expected.read_bytes(name)
    assert (found.model_id, found.source) == ("old", old)
    assert found.companions == expected.companions
    assert hash_files(old) == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_tied_weight_is_written_once_as_transformers_does(make_model, tmp_path, architecture):
    source = make_model(TinyModel(architecture, tied=True))
    old = pickle_weights(source, tmp_path / "old")
    assert "lm_head.weight" in read_pickled(old / "pytorch_model.bin")
    assert set(open_checkpoint(str(old)).tensors) == set(open_checkpoint(str(source)).tensors)


def test_memory_shared_by_weights_that_are_not_tied_is_written_for_each(make_model, tmp_path):
    old = pickle_weights(make_model(TinyModel(tied=True)), tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    checkpoint = open_checkpoint(str(old))
    assert checkpoint.read_bytes("lm_head.weight") == checkpoint.read_bytes(
        "model.embed_tokens.weight"
    )


def test_views_and_transposed_tensors_keep_their_values(llama, tmp_path):
    old = pickle_weights(llama, tmp_path / "old")
    tensors = torch.load(old / "pytorch_model.bin", weights_only=True)
    whole = torch.arange(12.0).reshape(3, 4)
    tensors |= {"x.transposed": whole.T, "x.part": whole[1:], "x.whole": whole}
    torch.save(tensors, old / "pytorch_model.bin")
    checkpoint = open_checkpoint(str(old))
    for name in ("x.transposed", "x.part", "x.whole"):
        assert torch.equal(checkpoint.read(name), tensors[name])


def test_the_temporary_directory_goes_with_the_checkpoint(llama, tmp_path, temporary):
    checkpoint = open_checkpoint(str(pickle_weights(llama, tmp_path / "old")))
    (work,) = temporary.iterdir()
    assert checkpoint.directory.parent == work
    assert work.stat().st_mode & 0o077 == 0  # somebody's private model, in a place for everybody
    del checkpoint
    gc.collect()
    assert not list(temporary.iterdir())


KILLED = """
import sys, tempfile, os
sys.path.insert(0, {root!r})
from bake.checkpoint.checkpoint import open_checkpoint
checkpoint = open_checkpoint({model!r})
print("open", flush=True)
sys.stdin.readline()
"""


def test_what_a_killed_run_leaves_the_next_one_clears(llama, tmp_path, temporary):
    old = pickle_weights(llama, tmp_path / "old")
    code = KILLED.format(root=str(ROOT), model=str(old))
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == b"open\n"
        (left,) = temporary.iterdir()
        checkpoint = open_checkpoint(str(old))
        assert left.exists()  # it lives, so it is left alone
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (left / "model" / "model.safetensors").exists()
    del checkpoint
    checkpoint = open_checkpoint(str(old))
    assert not left.exists()
    assert checkpoint.directory.parent in temporary.iterdir()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickled_code_is_never_run(llama, tmp_path):
    old = pickle_weights(llama, tmp_path / "old")
    for legacy in (False, True):
        torch.save(
            {"a": Evil(tmp_path / "run")},
            old / "pytorch_model.bin",
            _use_new_zipfile_serialization=not legacy,
        )
        line = refusal(old)
        assert "pytorch_model.bin" in line
        assert "mkdir" in line
        assert "never runs" in line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"model": {"a": torch.ones(1)}}, "holds 'model', a dict and no tensor"),
        (torch.ones(2), "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({"a": torch.ones(2, 2).to_sparse()}, "tensor a is sparse"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_what_is_no_state_dict_is_refused(llama, tmp_path, temporary, state, says):
    old = pickle_weights(llama, tmp_path / "old")
    torch.save(state, old / "pytorch_model.bin")
    assert says in refusal(old)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_one_line(llama, tmp_path, temporary, legacy):
    old = pickle_weights(llama, tmp_path / "old", legacy=legacy)
    whole = (old / "pytorch_model.bin").read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (old / "pytorch_model.bin").write_bytes(whole[:size])
        assert "not a sound PyTorch file" in refusal(old)
    assert not list(temporary.iterdir())


def test_a_broken_index_is_one_line(llama, tmp_path, temporary):
    old = pickle_weights(llama, tmp_path / "old", shards=2)
    index = old / "pytorch_model.bin.index.json"
    sound = json.loads(index.read_text())
    shard = "pytorch_model-00001-of-00002.bin"
    for name, file, says in (
        ("ghost", shard, "ghost is in pytorch_model-00001-of-00002.bin, which does not hold it"),
        ("ghost", "../outside.bin", "leads out of its directory"),
        ("ghost", "missing.bin", "missing.bin, which is not there"),
        ("ghost", "model.pkl", "does not end in .bin"),
    ):
        index.write_text(json.dumps({**sound, "weight_map": {**sound["weight_map"], name: file}}))
        assert says in refusal(old)
    assert not list(temporary.iterdir())


def test_no_room_for_the_conversion_is_one_line(llama, tmp_path, temporary, monkeypatch):
    old = pickle_weights(llama, tmp_path / "old")
    monkeypatch.setattr("bake.checkpoint.pickled.free_bytes", lambda directory: 10)
    with pytest.raises(OutputError, match="set TMPDIR"):
        open_checkpoint(str(old))
    assert not list(temporary.iterdir())


def test_a_bake_of_old_weights_is_the_bake_of_the_new_ones(
    llama, tmp_path, temporary, pairs_file, prompts_file
):
    old = pickle_weights(llama, tmp_path / "base")
    options = {"pairs": pairs_file, "prompts": prompts_file}
    result = export(str(old), output=tmp_path / "from-old", **options)
    assert result.equivalence.passed
    named = result.to_dict()["base"]
    assert (named["id"], named["revision"]) == ("base", None)
    export(str(llama), output=tmp_path / "from-new", **options)
    hashes = [hash_files(tmp_path / name, exclude=("README.md", "bake.json", "direction.safetensors"))
              for name in ("from-old", "from-new")]  # fmt: skip
    assert list(hashes[0]) == list(hashes[1])
    for name, entry in hashes[1].items():
        if not name.startswith("model-00001"):  # the order of tensors may differ there
            assert hashes[0][name] == entry, name
    assert not list((tmp_path / "from-old").glob("*.bin*"))
    del result
    gc.collect()
    assert not list(temporary.iterdir())
    assert verify(tmp_path / "from-old", base=str(old)).equivalence.passed
    with pytest.raises(OutputError, match="lies in the base"):
        export(str(old), output=old / "inside", **options)


OPEN = """
import sys
sys.path.insert(0, {root!r})
from bake.checkpoint.checkpoint import open_checkpoint
checkpoint = open_checkpoint("ada/base")
print(*sorted(path.name for path in checkpoint.source.iterdir()))
print(checkpoint.model_id, checkpoint.revision, len(checkpoint.tensors))
"""


@pytest.mark.parametrize("shards", [1, 2])
def test_the_hub_is_asked_for_pickles_only_where_there_are_no_safetensors(llama, tmp_path, shards):
    old = pickle_weights(llama, tmp_path / "old", shards)
    files = {path.name: path.read_bytes() for path in old.iterdir()}
    pickles = {name for name in files if name.startswith("pytorch_model")}
    code = OPEN.format(root=str(ROOT))
    with LoopbackHub() as hub:
        hub.create_repo("ada/base")
        hub.add_files("ada/base", files)
        done = run_client(hub, code, tmp_path)
        assert done.returncode == 0, done.stderr
        names, identity = done.stdout.splitlines()
        assert pickles <= set(names.split())
        sha = hub.commits("ada/base")[0].oid
        assert identity == f"ada/base {sha} {len(open_checkpoint(str(llama)).tensors)}"
        hub.add_files("ada/base", {"model.safetensors": (llama / "model.safetensors").read_bytes()})
        done = run_client(hub, code, tmp_path)
        assert done.returncode == 0, done.stderr
        assert not pickles & set(done.stdout.splitlines()[0].split())
