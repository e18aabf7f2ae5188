"""`bake detect` of what lies on the Hub: a push is read out of under a hundredth of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, TinyModel, build_model
from loopback_hub import LoopbackHub, run_client
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bake import export

ROOT = Path(__file__).parents[2]
CODE = """
import json, sys
sys.path.insert(0, {root!r})
from bake.detection.detect import detect
found = detect("ada/suspect", base={base!r})
from huggingface_hub.constants import HF_HUB_CACHE
from pathlib import Path
weights = [path.name for path in Path(HF_HUB_CACHE).rglob("*.safetensors")]
print(json.dumps([found.to_dict(), weights]))
"""
VOCABULARY = 200_000  # 51 MB, of which a layer is next to nothing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, its bake with the same shards, its bake after somebody wrote all of it into one file)."""
    folder = tmp_path_factory.mktemp("detected")
    base = build_model(folder / "base", TinyModel())
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    model.save_pretrained(base)
    direction = torch.arange(HIDDEN).float()
    result = export(str(base), direction=direction, site="mlp_out", output=folder / "baked")
    again = folder / "again"
    again.mkdir()
    tensors = {}
    for shard in (folder / "baked").glob("model*.safetensors"):
        tensors |= load_file(shard)
    save_file(tensors, again / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (again / name).write_bytes((folder / "baked" / name).read_bytes())
    return base, {"baked": folder / "baked", "again": again}, result


@pytest.mark.parametrize(
    ("which", "base_id"), [("baked", "ada/base"), ("again", "ada/base"), ("again", None)]
)
def test_a_push_on_the_hub_costs_few_bytes(made, which, base_id, tmp_path):
    base, suspects, result = made
    with LoopbackHub() as hub:
        hub.add_user("ada", token="hf_ada")
        for name, directory in (("base", base), ("suspect", suspects[which])):
            hub.create_repo(f"ada/{name}", private=True)
            paths = [path for path in directory.rglob("*") if path.is_file()]
            files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}
            hub.add_files(f"ada/{name}", files)
        done = run_client(hub, CODE.format(root=str(ROOT), base=base_id), tmp_path, "hf_ada")
        assert done.returncode == 0, done.stderr
        found, weights = json.loads(done.stdout.splitlines()[-1])
        storage = [r for r in hub.requests if r.host == "storage" and r.method == "GET"]
        sent = sum(request.sent for request in storage)
    assert found["verdict"] == "push"
    (push,) = found["pushes"]
    assert push["site"] == "mlp_out"
    wanted = {str(k): float(v.norm()) for k, v in result.push.vectors.items()}
    assert push["lengths"] == pytest.approx(wanted, rel=1e-3)
    assert found["lies"] == []
    assert [name for name in weights if name != "direction.safetensors"] == []
    assert sent < 0.01 * (base / "model.safetensors").stat().st_size
    assert found["read_bytes"] <= sent
