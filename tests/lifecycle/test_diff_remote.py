"""`bake diff` of what lies on the Hub: headers and ranged reads, and no weight file is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, TinyModel, build_model
from loopback_hub import LoopbackHub, run_client

from bake import diff, export

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
sys.path.insert(0, {root!r})
from bake.lifecycle import diff as compare
found = compare.diff("ada/base", "ada/baked")
from huggingface_hub.constants import HF_HUB_CACHE
from pathlib import Path
weights = [path.name for path in Path(HF_HUB_CACHE).rglob("*.safetensors")]
print(json.dumps([found.to_dict(), weights]))
"""


def make(folder, model):
    """(base, its bake) on disk."""
    base = build_model(folder / "base", model)
    direction = torch.arange(HIDDEN).float()
    export(str(base), direction=direction, site="mlp_out", output=folder / "baked")
    return base, folder / "baked"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bake that patches some of its base's shards."""
    return make(tmp_path_factory.mktemp("remote"), TinyModel("gpt2", sharded=True))


def ask(hub, base, baked, folder):
    """What `bake diff` of the two, published, says, and the weight files that it fetched."""
    hub.add_user("ada", token="hf_ada")
    for name, directory in (("base", base), ("baked", baked)):
        hub.create_repo(f"ada/{name}", private=True)
        paths = (path for path in directory.rglob("*") if path.is_file())
        hub.add_files(
            f"ada/{name}", {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}
        )
    done = run_client(hub, CODE.format(root=str(ROOT)), folder, "hf_ada")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_of_two_repositories_only_what_differs_is_read(made, tmp_path):
    base, baked = made
    with LoopbackHub() as hub:
        found, weights = ask(hub, base, baked, tmp_path)
        here = json.loads(json.dumps(diff(base, baked).to_dict()))
        assert found["tensors"] == here["tensors"]
        assert found["config"] == here["config"]
        assert found["same_tensors"] == here["same_tensors"]
        assert {change["kind"] for change in found["tensors"]} == {"changed"}
        assert weights == []
        files = {path.name: path for path in base.glob("*.safetensors")}
        patched = [n for n, p in files.items() if p.read_bytes() != (baked / n).read_bytes()]
        assert 0 < len(patched) < len(files)


def test_of_shards_that_are_the_same_only_the_headers_are_read(tmp_path):
    """Counted by the server: the first 128 KB of each shard, and the new tensors."""
    config = (("intermediate_size", 8000),)
    base, baked = make(tmp_path, TinyModel(config=config))
    with LoopbackHub() as hub:
        found, weights = ask(hub, base, baked, tmp_path)
        storage = [r for r in hub.requests if r.host == "storage" and r.method == "GET"]
        assert all("range" in request.headers for request in storage)
        read = sum(request.sent for request in storage)
    recorded = json.loads((baked / "bake.json").read_text())
    assert {change["name"] for change in found["tensors"]} == set(recorded["plan"]["added"])
    assert weights == []
    shards = [*base.glob("*.safetensors"), *baked.glob("model*.safetensors")]
    heads = sum(min(path.stat().st_size, 128 * 1024) for path in shards)
    extra = max(baked.glob("model*.safetensors"), key=lambda path: path.name).stat().st_size
    assert read <= heads + 2 * extra
    assert read < 0.05 * sum(path.stat().st_size for path in shards)
