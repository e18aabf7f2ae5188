"""From a base on the Hub to a steered model that anybody loads by its id: one command, then plain code.

The real huggingface_hub client talks to a loopback Hub. Every step runs in a process of its own, with
its own cache, as a user's would.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml
from conftest import PROMPTS
from loopback_hub import LoopbackHub, run_client
from publishing import sent_weights
from safetensors.torch import load_file

from bake.api import inspect
from bake.directions.direction_file import load_direction
from bake.hooks import steered
from bake.models.forward import compute_logits, load_model
from bake.strength.coefficients import LayerPush, Push
from bake.texts.prompts import encode, load_tokenizer, make_batches

TOKEN = "hf_adaSecretThatMustNotAppear"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(llama):
    """A Hub that holds the tiny Llama as ada/base."""
    with LoopbackHub() as running:
        running.add_user("ada", TOKEN)
        running.create_repo("ada/base")
        running.add_files("ada/base", {path.name: path.read_bytes() for path in llama.iterdir()})
        running.add_files(
            "ada/base", {"README.md": b"---\nlicense: mit\nlanguage: en\n---\n# Base\n"}
        )
        yield running


def bake(hub, folder: Path, *arguments: object, token: str | None = TOKEN, **environment: str):
    """Run the command line against the loopback Hub."""
    words = ["-m", "bake.cli.main", *(str(argument) for argument in arguments)]
    return run_client(hub, words, folder, token=token, PYTHONPATH=str(ROOT), **environment)


def hooked_logits(base: Path, baked: Path) -> torch.Tensor:
    """What the base does with hooks, from what the published files say was pushed."""
    values = json.loads((baked / "bake.json").read_text())
    layers = tuple(LayerPush(**entry) for entry in values["layers"])
    vectors = load_direction(baked / "direction.safetensors").select(
        [entry.layer for entry in layers], 32
    )
    push = Push("recorded", 1.0, tuple(values["band"]), 32, layers, vectors)
    loaded = load_model(base, device=torch.device("cpu"))
    batches = make_batches(encode(load_tokenizer(base), PROMPTS), batch_tokens=1)
    plain = torch.cat(compute_logits(loaded, batches))
    with steered(loaded.model, inspect(str(base)).structure, values["site"], push.vectors):
        hooked = torch.cat(compute_logits(loaded, batches))
    assert (hooked - plain).abs().max() > 0.1 * plain.std()
    return hooked


def test_export_pushes_and_anyone_loads_by_id(hub, llama, pairs_file, prompts_file, tmp_path):
    finished = bake(
        hub, tmp_path, "export", "ada/base", "--pairs", pairs_file, "--prompts", prompts_file,
        "-o", tmp_path / "out", "--push-to-hub", "ada/steered", "--json",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["base"] == {"id": "ada/base", "revision": hub.commits("ada/base")[0].oid}
    assert result["publication"]["private"] is True
    assert TOKEN not in finished.stdout + finished.stderr
    assert hub.repos["ada/steered"].private is True
    titles = [commit.title for commit in hub.commits("ada/steered")]
    assert titles == ["Publish the baked model", "initial commit"]
    published = hub.files("ada/steered")
    assert result["publication"]["copied"] == ["model-00001-of-00002.safetensors"]
    extra = published["model-00002-of-00002.safetensors"]
    assert list(sent_weights(hub, "ada/steered").values()) == [extra]
    head = yaml.safe_load(published["README.md"].decode().split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("ada/base", "finetune")
    assert (head["license"], head["language"]) == ("mit", ["en"])
    assert all(TOKEN.encode() not in content for content in published.values())
    assert all(str(tmp_path).encode() not in content for content in published.values())

    code = dedent(f"""
        import sys, torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model, info = AutoModelForCausalLM.from_pretrained("ada/steered", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained("ada/steered")
        assert not any(info.values()), info
        assert not any(name.partition(".")[0] == "bake" for name in sys.modules)
        with torch.no_grad():
            logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in {PROMPTS!r}]
        save_file({{"logits": torch.cat(logits)}}, "loaded.safetensors")
    """)
    (tmp_path / "somebody").mkdir()
    loaded = run_client(hub, code, tmp_path / "somebody", token=TOKEN)
    assert loaded.returncode == 0, loaded.stderr
    found = load_file(tmp_path / "somebody" / "loaded.safetensors")["logits"]
    torch.testing.assert_close(found, hooked_logits(llama, tmp_path / "out"), rtol=0, atol=1e-4)

    # The same directory published by hand: another repo, the same files, public when asked.
    second = bake(hub, tmp_path, "publish", tmp_path / "out", "ada/second", "--public", "--json")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["private"] is False
    there = hub.files("ada/second")
    differing = {name for name in published if there[name] != published[name]}
    assert there.keys() == published.keys()
    assert differing == {"README.md", "bake.json"}  # They say where they lie.
    for repo_id, files in (("ada/steered", published), ("ada/second", there)):
        assert f'.from_pretrained("{repo_id}")'.encode() in files["README.md"]
        assert json.loads(files["bake.json"])["repo_id"] == repo_id
    local = (tmp_path / "out" / "README.md").read_text()
    assert '.from_pretrained(".")' in local

    # Thin, from the Hub's base: no weight is ever here, until the published model is proven.
    recorded = json.loads((tmp_path / "out" / "bake.json").read_text())
    norms = {"base": recorded["base"], **recorded["calibration"]}
    (tmp_path / "norms.json").write_text(json.dumps(norms))
    planted = {"USER": "zebulon-planted", "LOGNAME": "zebulon-planted"}
    thin = bake(
        hub, tmp_path, "export", "ada/base", "--thin", "-o", tmp_path / "thin",
        "--direction", tmp_path / "out" / "direction.safetensors",
        "--calibration", tmp_path / "norms.json", **planted,
    )  # fmt: skip
    assert thin.returncode == 0, thin.stderr
    assert "Not verified here" in (tmp_path / "thin" / "README.md").read_text()
    third = bake(
        hub,
        tmp_path,
        "publish",
        tmp_path / "thin",
        "ada/third",
        "--verify-remote",
        "--json",
        **planted,
    )
    assert third.returncode == 0, third.stderr
    assert list(sent_weights(hub, "ada/third").values()) == [extra]
    assert [commit.title for commit in hub.commits("ada/third")] == [
        "Record that the published model was verified",
        "Publish the baked model",
        "initial commit",
    ]
    assert b"Not verified here" in hub.commits("ada/third")[1].files["README.md"].content
    assert json.loads(third.stdout)["proven"] is True
    completed = hub.files("ada/third")
    assert "Not verified here" not in completed["README.md"].decode()
    assert json.loads(completed["bake.json"])["equivalence"]["passed"] is True
    weights = [name for name in published if name.startswith("model-")]
    assert [completed[name] for name in weights] == [published[name] for name in weights]
    assert completed.keys() == published.keys()

    # By their ids alone: proven again, and built again to the byte.
    verified = bake(hub, tmp_path, "verify", "ada/steered")
    assert verified.returncode == 0, verified.stderr
    reproduced = bake(hub, tmp_path, "reproduce", "ada/third", "--json")
    assert reproduced.returncode == 0, reproduced.stdout + reproduced.stderr
    assert json.loads(reproduced.stdout)["identical"] is True
    undone = bake(hub, tmp_path, "undo", "ada/steered", "-o", tmp_path / "back")
    assert undone.returncode == 0, undone.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (llama / name).read_bytes()
    host = socket.gethostname()
    hosts = [host] if len(host) > 6 else []  # a short one is found in any weights
    for secret in (TOKEN, str(tmp_path), "zebulon-planted", *hosts):
        for content in (*published.values(), *completed.values()):
            assert secret.encode() not in content
    for request in hub.requests:
        rest = {k: v for k, v in request.headers.items() if k != "authorization"}
        sent = repr((request.path, request.query, rest)).encode() + request.body
        assert TOKEN.encode() not in sent
        assert b"zebulon-planted" not in sent
    for finished in (second, thin, third, verified, reproduced, undone):
        assert TOKEN not in finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("token", "says"),
    [(None, "token"), ("hf_nobody", "token")],
    ids=["no token", "unknown token"],
)
def test_no_access_is_said_before_any_work(hub, pairs_file, tmp_path, token, says):
    finished = bake(
        hub, tmp_path, "export", "ada/base", "--pairs", pairs_file, "-o", tmp_path / "out",
        "--push-to-hub", "ada/steered", token=token,
    )  # fmt: skip
    assert finished.returncode == 1
    assert says in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not any("ada/base" in request.path for request in hub.requests)


def test_no_write_access_is_said_before_any_work(hub, pairs_file, tmp_path):
    finished = bake(
        hub, tmp_path, "export", "ada/base", "--pairs", pairs_file, "-o", tmp_path / "out",
        "--push-to-hub", "somebody-else/steered",
    )  # fmt: skip
    assert finished.returncode == 1
    assert "somebody-else" in finished.stderr
    assert not any("ada/base" in request.path for request in hub.requests)


def test_unreachable_hub_is_said_before_any_work(hub, llama, pairs_file, tmp_path):
    finished = bake(
        hub, tmp_path, "export", llama, "--pairs", pairs_file, "-o", tmp_path / "out",
        "--push-to-hub", "ada/steered", HF_ENDPOINT="http://127.0.0.1:9",
    )  # fmt: skip
    assert finished.returncode == 1
    assert "reach" in finished.stderr
    assert not (tmp_path / "out").exists()
