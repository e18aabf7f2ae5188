"""A thin bake: written from headers, honest about what it lacks, and whole once that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from canned import passed
from conftest import TinyModel
from loopback_hub import LoopbackHub, run_client
from pickled_models import pickle_weights
from safetensors.torch import save_file

from bake.api import calibrate, export, verify
from bake.checkpoint.checkpoint import Checkpoint
from bake.cli.main import main
from bake.errors import BakeError, CheckpointError, EquivalenceError, HubError, UnsupportedError
from bake.hub import publish
from bake.io.hashing import hash_files
from bake.pipeline import completion

ROOT = Path(__file__).parents[2]


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "direction.safetensors"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    save_file({"direction": vector}, path, metadata={"site": "mlp_out", "method": "given"})
    return path


@pytest.fixture(scope="module")
def measured():
    """Calibrations by (base, site): each is measured once."""
    return {}


@pytest.fixture
def run(capsys):
    """Return a function (arguments) → (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def calibration(tmp_path, prompts_file, measured):
    """Return a function (base, site) → the file of its calibration."""

    def make(base: Path, site: str = "mlp_out") -> Path:
        path = tmp_path / "norms.json"
        if (base, site) not in measured:
            calibrate(str(base), output=path, prompts=prompts_file, site=site)
            measured[base, site] = path.read_bytes()
        path.write_bytes(measured[base, site])
        return path

    return make


@pytest.fixture
def base(make_model):
    return make_model(TinyModel(dtype="bfloat16", sharded=True))


def add_shards(base: Path, output: Path, how=shutil.copyfile) -> list[str]:
    """Do what `bake verify` asks for."""
    needed = json.loads((output / "bake.json").read_text())["thin"]["shards"]
    for shard in needed:
        how(base / shard["base_file"], output / shard["name"])
    return [shard["name"] for shard in needed]


def forbid_reading(monkeypatch):
    def refuse(self, *arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "_read_range", refuse)


# ---------------------------------------------------------------- the calibration


def test_a_saved_calibration_takes_the_place_of_measuring(
    base, tmp_path, direction, calibration, prompts_file, monkeypatch
):
    measured = export(str(base), output=tmp_path / "a", direction=direction, prompts=prompts_file)
    norms = calibration(base)
    monkeypatch.setattr(
        "bake.pipeline.decision.load_base", None
    )  # the model is not loaded to be measured
    read = export(str(base), output=tmp_path / "b", direction=direction, calibration=norms)
    for one, other in zip(measured.push.layers, read.push.layers, strict=True):
        assert one.layer == other.layer
        assert one.activation_norm == pytest.approx(other.activation_norm, rel=1e-6)
        assert one.coefficient == pytest.approx(other.coefficient, rel=1e-6)
    assert read.equivalence.passed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"site": "attn_out"}, "the site is mlp_out here and attn_out there"),
        ({"hidden_size": 64}, "the hidden size is 32 here and 64 there"),
        ({"base": {"id": "other", "revision": None}}, "and other there"),
        ({"base": {"id": None, "revision": None}}, "and None there"),
        ({"base": {"revision": "abc"}}, "and None there"),
        ({"base": None}, "does not say on which base"),
        ({"statistic": "median"}, "give --statistic median"),
        ({"layers": []}, "of 0 layers"),
        ({"layers": [{"layer": 2}]}, "not what bake calibrate writes"),
        ({"layers": 5}, "not what bake calibrate writes"),
    ],
)
def test_a_calibration_of_something_else_is_one_line(
    base, tmp_path, direction, calibration, change, says
):
    path = calibration(base)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BakeError, match=says) as caught:
        export(str(base), output=tmp_path / "out", direction=direction, calibration=path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["3.0", None, -1.0, float("inf"), True])
def test_a_norm_that_is_no_number_is_one_line(base, tmp_path, direction, calibration, value):
    path = calibration(base)
    values = json.loads(path.read_text())
    values["layers"][3]["mean"] = value
    path.write_text(json.dumps(values))
    with pytest.raises(BakeError, match=r"mean = .* in layer 3"):
        export(str(base), output=tmp_path / "out", direction=direction, calibration=path)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_file_that_is_no_calibration_is_one_line(base, tmp_path, direction, text):
    path = tmp_path / "norms.json"
    path.write_text(text)
    for given in (path, tmp_path / "missing.json"):
        with pytest.raises(BakeError, match="measure it with bake calibrate") as caught:
            export(str(base), output=tmp_path / "out", direction=direction, calibration=given)
        assert str(given) in str(caught.value)


# ---------------------------------------------------------------- thin


@pytest.mark.parametrize(("site", "sharded"), [("mlp_out", True), ("attn_out", False)])
def test_completed_and_verified_it_is_the_whole_bake(
    make_model, tmp_path, direction, calibration, site, sharded, monkeypatch
):
    base = make_model(TinyModel(dtype="bfloat16", sharded=sharded))
    options = {"direction": direction, "site": site, "calibration": calibration(base, site)}
    thin, whole = tmp_path / "thin", tmp_path / "whole"
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        export(str(base), output=thin, thin=True, **options)
    export(str(base), output=whole, **options)
    shards = set(
        json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    written = {name for name in hash_files(thin) if name in shards}
    assert written == {max(shards)}  # the new tensors' shard and nothing else
    assert sum(path.stat().st_size for path in thin.glob("*.safetensors")) < 30_000

    recorded = json.loads((thin / "bake.json").read_text())
    assert recorded["equivalence"]["passed"] is False
    assert recorded["equivalence"]["verified"] is False
    card = (thin / "README.md").read_text()
    assert "Not verified here" in card
    assert "mechanism" not in card

    add_shards(base, thin)
    assert verify(thin, base=str(base)).equivalence.passed
    assert hash_files(thin) == hash_files(whole)  # bake.json and the card with them
    assert verify(thin, base=str(base)).equivalence.passed  # and again, as a whole bake


def test_verify_says_what_is_missing_and_where_it_is(
    base, tmp_path, direction, calibration, run, monkeypatch
):
    monkeypatch.setattr(completion, "_SHOWN", 2)
    out = tmp_path / "out"
    code, text, _ = run(
        "export", base, "--thin", "--direction", direction, "--calibration", calibration(base),
        "-o", out,
    )  # fmt: skip
    assert code == 0
    assert "NOT verified" in text
    needed = json.loads((out / "bake.json").read_text())["thin"]["shards"]
    assert needed[0]["base_file"] in text
    before = hash_files(out)
    code, text, errors = run("verify", out, "--base", base)
    assert (code, text) == (1, "")
    assert len(errors.splitlines()) == 1
    for part in (
        needed[0]["base_file"],
        needed[0]["name"],
        base.name,
        f"and {len(needed) - 2} more",
    ):
        assert part in errors
    names = add_shards(base, out, lambda source, target: target.symlink_to(source))
    (out / names[1]).unlink()
    _, _, errors = run("verify", out, "--base", base)
    assert f"lacks 1 of {len(needed)} shards" in errors
    assert names[1] in errors
    (out / names[1]).write_bytes(b"half")
    _, _, errors = run("verify", out, "--base", base)
    assert f"{names[1]} has 4 bytes" in errors
    (out / names[1]).unlink()
    (out / names[1]).hardlink_to(base / needed[1]["base_file"])
    assert {name: h for name, h in hash_files(out).items() if name in before} == before
    code, text, errors = run("verify", out, "--base", base)
    assert code == 0, errors
    assert "is proven" in errors
    assert json.loads((out / "bake.json").read_text())["equivalence"]["passed"] is True


def test_shards_of_another_model_are_not_recorded_as_proven(
    make_model, base, tmp_path, direction, calibration
):
    out = tmp_path / "out"
    export(str(base), output=out, direction=direction, calibration=calibration(base), thin=True)
    before = {name: (out / name).read_bytes() for name in ("bake.json", "README.md")}
    add_shards(make_model(TinyModel(dtype="bfloat16", sharded=True, seed=1)), out)
    failures = verify(out, base=str(base)).equivalence.failures
    assert any("is not the base's" in failure for failure in failures)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_a_record_that_is_interrupted_leaves_it_unproven_and_can_be_made_again(
    base, tmp_path, direction, calibration, monkeypatch
):
    out = tmp_path / "out"
    export(str(base), output=out, direction=direction, calibration=calibration(base), thin=True)
    add_shards(base, out)
    monkeypatch.setattr("bake.lifecycle.verify.prove", passed)
    before = hash_files(out)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bake.io.staging.sync", die)
        with pytest.raises(KeyboardInterrupt):
            verify(out, base=str(base))
    assert hash_files(out) == before
    assert verify(out, base=str(base)).equivalence.passed
    recorded = json.loads((out / "bake.json").read_text())
    assert recorded["equivalence"]["passed"] is True
    assert recorded["files"] == hash_files(out, exclude=("bake.json",))


@pytest.mark.parametrize(
    "command",
    [["rescale", "-m", "2"], ["undo", "-o", "base"], ["reproduce", "--base", "BASE"]],
    ids=str,
)
def test_every_command_says_that_it_is_thin(
    base, tmp_path, direction, calibration, capsys, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    export(
        str(base),
        output=tmp_path / "out",
        direction=direction,
        calibration=calibration(base),
        thin=True,
    )
    before = hash_files(tmp_path / "out")
    words = [str(base) if word == "BASE" else word for word in command]
    assert main([words[0], "out", *words[1:]]) == 1
    assert "out is a thin bake and lacks" in capsys.readouterr().err
    assert hash_files(tmp_path / "out") == before
    assert not (tmp_path / "base").exists()
    add_shards(base, tmp_path / "out")
    if command[0] == "reproduce":
        assert main([words[0], "out", *words[1:]]) == 1
        assert "thin bake that has not been proven yet: run bake verify" in capsys.readouterr().err


def test_of_a_local_base_it_cannot_be_published(base, tmp_path, direction, calibration):
    out = tmp_path / "out"
    export(str(base), output=out, direction=direction, calibration=calibration(base), thin=True)
    with pytest.raises(HubError, match="can be published where its base lies on the Hub"):
        publish(out, "ada/steered")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"calibration": None}, "needs --direction FILE and --calibration FILE"),
        ({"direction": None, "pairs": "x"}, "needs --direction FILE and --calibration FILE"),
        ({"dtype": "float32"}, "--dtype"),
        ({"shards": "symlink"}, "--shards"),
        ({"convert_site": True}, "--convert-site"),
        ({"push_to_hub": "ada/x"}, "--push-to-hub"),
    ],
)
def test_options_that_need_weights_are_refused(base, tmp_path, direction, options, says):
    given = {"direction": direction, "calibration": tmp_path / "norms.json", **options}
    with pytest.raises(BakeError, match=says):
        export(str(base), output=tmp_path / "out", thin=True, **given)


def test_sites_that_need_weights_are_refused_and_others_named(
    make_model, base, tmp_path, direction, calibration
):
    given = {"direction": direction, "thin": True, "output": tmp_path / "out"}
    native = make_model(TinyModel("gpt2"))
    with pytest.raises(UnsupportedError, match="bias exists already") as caught:
        export(str(native), calibration=calibration(native), **given)
    assert "thin here: no site" in str(caught.value)
    at_input = tmp_path / "at_input.safetensors"
    save_file({"direction": torch.ones(32)}, at_input, metadata={"site": "attn_in"})
    given["direction"] = at_input
    with pytest.raises(UnsupportedError, match="through a weight matrix") as caught:
        export(str(base), site="attn_in", calibration=calibration(base, "attn_in"), **given)
    assert "--site mlp_out, --site attn_out" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pickled_base_is_refused(llama, tmp_path, direction, calibration):
    old = pickle_weights(llama, tmp_path / "old")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        export(
            str(old), output=tmp_path / "out", thin=True, direction=direction,
            calibration=calibration(old),
        )  # fmt: skip


def test_a_base_without_a_tokenizer_will_do(base, tmp_path, direction, calibration):
    norms = calibration(base)
    bare = tmp_path / base.name
    bare.mkdir()
    for path in base.iterdir():
        if path.name == "config.json" or path.name.startswith("model"):
            (bare / path.name).write_bytes(path.read_bytes())
    export(str(bare), output=tmp_path / "out", direction=direction, calibration=norms, thin=True)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_from_the_hub_no_weights_are_downloaded(llama, tmp_path, direction, calibration):
    norms = calibration(llama)
    out = tmp_path / "out"
    with LoopbackHub() as hub:
        hub.create_repo("ada/base")
        hub.add_files("ada/base", {path.name: path.read_bytes() for path in llama.iterdir()})
        sha = hub.commits("ada/base")[0].oid
        values = {**json.loads(norms.read_text()), "base": {"id": "ada/base", "revision": sha}}
        norms.write_text(json.dumps(values))

        def bake(*words: object):
            arguments = ["-m", "bake.cli.main", *map(str, words)]
            return run_client(hub, arguments, tmp_path, PYTHONPATH=str(ROOT))

        done = bake(
            "export", "ada/base", "--thin", "--direction", direction, "--calibration", norms,
            "-o", out, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (shard,) = json.loads(done.stdout)["thin"]["shards"]
        assert shard["sha256"] == hash_files(llama)["model.safetensors"]["sha256"]
        storage = [request for request in hub.requests if request.host == "storage"]
        assert storage
        assert all("range" in request.headers for request in storage)
        assert not list((tmp_path / "hf_home").rglob("model.safetensors"))
        done = bake("verify", out)
        assert done.returncode == 1
        assert f"of ada/base at revision {sha}" in done.stderr
        assert not list((tmp_path / "hf_home").rglob("model.safetensors"))
        add_shards(llama, out)
        done = bake("verify", out)  # with the base that bake.json names
        assert done.returncode == 0, done.stderr
    assert json.loads((out / "bake.json").read_text())["equivalence"]["passed"] is True


def test_a_failed_proof_exits_with_3_and_records_nothing(
    base, tmp_path, direction, calibration, run
):
    out = tmp_path / "out"
    export(str(base), output=out, direction=direction, calibration=calibration(base), thin=True)
    add_shards(base, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    code, _, errors = run("verify", out, "--base", base)
    assert code == EquivalenceError.exit_code
    assert "base model" in errors
    assert json.loads((out / "bake.json").read_text())["equivalence"]["passed"] is False
