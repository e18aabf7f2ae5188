"""Headers without weights: of what lies on the Hub, and of what lies here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import TinyModel
from loopback_hub import LoopbackHub, Reply, run_client
from pickled_models import pickle_weights

from bake.checkpoint import remote
from bake.checkpoint.checkpoint import open_checkpoint
from bake.errors import CheckpointError
from bake.io.hashing import hash_files

ROOT = Path(__file__).parents[2]

OPEN = """
import json, sys
sys.path.insert(0, {root!r})
from bake.checkpoint import remote
remote._FIRST_BYTES = {first_bytes}
from bake.checkpoint.checkpoint import open_checkpoint
from bake.errors import CheckpointError
try:
    checkpoint = open_checkpoint("ada/base", headers_only=True)
except CheckpointError as error:
    print(json.dumps(str(error)))
else:
    entries = {{name: repr(entry) for name, entry in checkpoint.tensors.items()}}
    known = {{shard: checkpoint.known_sha256(shard) for shard in checkpoint.shards}}
    weights = [path.name for path in checkpoint.directory.glob("*.safetensors")]
    print(json.dumps([checkpoint.revision, entries, known, weights]))
"""


def open_headers(hub, tmp_path, token="hf_ada", first_bytes=4096, **environment):
    code = OPEN.format(root=str(ROOT), first_bytes=first_bytes)
    done = run_client(hub, code, tmp_path, token, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        running.add_user("ada", token="hf_ada")
        running.create_repo("ada/base", private=True)
        yield running


def weight_bytes_sent(hub) -> int:
    return sum(request.sent for request in hub.requests if request.host == "storage")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("first_bytes", [16, 4096], ids=["two requests", "one request"])
def test_headers_from_the_hub_are_those_of_the_files(
    hub, make_model, tmp_path, sharded, first_bytes
):
    source = make_model(TinyModel(sharded=sharded))
    hub.add_files("ada/base", {path.name: path.read_bytes() for path in source.iterdir()})
    expected = open_checkpoint(str(source))
    revision, entries, known, weights = open_headers(hub, tmp_path, first_bytes=first_bytes)
    assert revision == hub.commits("ada/base")[0].oid
    assert entries == {name: repr(entry) for name, entry in expected.tensors.items()}
    assert weights == []  # nothing of them in the cache
    hashes = hash_files(source)
    assert known == {shard: hashes[shard]["sha256"] for shard in expected.shards}
    headers = sum(header.data_start for header in expected.headers.values())
    assert headers <= weight_bytes_sent(hub) <= headers + len(expected.shards) * 4096
    if not sharded:
        assert weight_bytes_sent(hub) < expected.size / 10
    storage = [request for request in hub.requests if request.host == "storage"]
    assert not any("authorization" in request.headers for request in storage)


def test_a_server_that_ignores_ranges_is_hung_up_on(hub, llama, tmp_path):
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    hub.add_files("ada/base", files)
    whole = files["model.safetensors"]
    hub.before_request = lambda request: Reply(200, whole) if request.host == "storage" else None
    _, entries, _, _ = open_headers(hub, tmp_path)
    assert entries == {
        name: repr(entry) for name, entry in open_checkpoint(str(llama)).tensors.items()
    }


def test_what_is_in_the_cache_is_read_there(hub, llama, tmp_path):
    hub.add_files("ada/base", {path.name: path.read_bytes() for path in llama.iterdir()})
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bake.checkpoint.checkpoint import open_checkpoint; open_checkpoint('ada/base')"
    )
    assert run_client(hub, code, tmp_path, "hf_ada").returncode == 0
    hub.requests.clear()
    online = open_headers(hub, tmp_path)
    assert weight_bytes_sent(hub) == 0
    offline = open_headers(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (online[:2], online[3]) == (offline[:2], offline[3])


def test_what_cannot_be_read_from_afar_is_one_line(hub, llama, tmp_path):
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    whole = files.pop("model.safetensors")
    hub.add_files("ada/base", files)
    assert "neither model.safetensors nor pytorch_model.bin" in open_headers(hub, tmp_path)
    for content, says in (
        (b"x", "fewer than a safetensors prefix"),
        (b"\xff" * 100, "its header claims"),
        (whole[:-1], "truncated"),
        (whole[:100], "truncated inside its header"),
    ):
        hub.add_files("ada/base", {"model.safetensors": content})
        line = open_headers(hub, tmp_path)
        assert "ada/base/model.safetensors" in line
        assert says in line
    hub.requests.clear()
    assert "no such model" in open_headers(hub, tmp_path, token=None)
    assert weight_bytes_sent(hub) == 0


def test_pickles_on_the_hub_have_no_headers_to_read(hub, llama, tmp_path):
    old = pickle_weights(llama, tmp_path / "old")
    hub.add_files("ada/base", {path.name: path.read_bytes() for path in old.iterdir()})
    assert "has only pickled weights (pytorch_model.bin)" in open_headers(hub, tmp_path)
    assert weight_bytes_sent(hub) == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_headers_of_local_pickles_are_those_of_the_conversion(llama, tmp_path, monkeypatch, shards):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    old = pickle_weights(llama, tmp_path / "old", shards)
    headers = open_checkpoint(str(old), headers_only=True)
    assert not list((tmp_path / "temporary").iterdir())
    assert headers.headers == open_checkpoint(str(old)).headers


def test_weights_are_not_read_where_only_headers_were_asked_for(llama):
    checkpoint = open_checkpoint(str(llama), headers_only=True)
    with pytest.raises(CheckpointError, match=re.escape("model.norm.weight")):
        checkpoint.read("model.norm.weight")
    assert remote._FIRST_BYTES >= 100_000  # most headers on the Hub fit into one request
