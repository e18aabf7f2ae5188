"""`bake diff` of what lies on the Hub: headers and ranged reads, and no weight file is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, TinyModel, build_model
from loopback_hub import LoopbackHub, run_client

from bake import diff, export

ROOT = Path(__file__).parent.parent
CODE = """
import json, sys
sys.path.insert(0, {root!r})
from bake import compare
found = compare.diff("ada/base", "ada/baked")
from huggingface_hub.constants import HF_HUB_CACHE
from pathlib import Path
weights = [path.name for path in Path(HF_HUB_CACHE).rglob("*.safetensors")]
print(json.dumps([found.to_dict(), weights]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, a bake that patches some of its shards) on disk."""
    folder = tmp_path_factory.mktemp("remote")
    base = build_model(folder / "base", TinyModel("gpt2", sharded=True))
    direction = torch.arange(HIDDEN).float()
    export(str(base), direction=direction, site="mlp_out", output=folder / "baked")
    return base, folder / "baked"


def test_of_two_repositories_only_what_differs_is_read(made, tmp_path):
    base, baked = made
    with LoopbackHub() as hub:
        hub.add_user("ada", token="hf_ada")
        for name, directory in (("base", base), ("baked", baked)):
            hub.create_repo(f"ada/{name}", private=True)
            files = {
                path.relative_to(directory).as_posix(): path.read_bytes()
                for path in directory.rglob("*")
                if path.is_file()
            }
            hub.add_files(f"ada/{name}", files)
        done = run_client(hub, CODE.format(root=str(ROOT)), tmp_path, "hf_ada")
        assert done.returncode == 0, done.stderr
        found, weights = json.loads(done.stdout.splitlines()[-1])
        here = json.loads(json.dumps(diff(base, baked).to_dict()))
        assert found["tensors"] == here["tensors"]
        assert found["config"] == here["config"]
        assert found["same_tensors"] == here["same_tensors"]
        assert {change["kind"] for change in found["tensors"]} == {"changed"}
        assert weights == []
        files = {path.name: path for path in base.glob("*.safetensors")}
        patched = [n for n, p in files.items() if p.read_bytes() != (baked / n).read_bytes()]
        assert 0 < len(patched) < len(files)
