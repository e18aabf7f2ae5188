"""Back to the base and to another strength: undo, rescale, reproduce and diff of what bake wrote."""

import json
import shutil

import pytest
import torch
from canned import passed
from conftest import HIDDEN, TinyModel, build_model
from safetensors.torch import load_file, save_file

from bake import diff, export, reproduce, rescale, undo, verify
from bake.cli.main import main
from bake.errors import BakeError, CheckpointError, EquivalenceError
from bake.io.hashing import hash_files
from bake.io.work_directory import scratch_directory

RECIPES = {
    "host": ("mistral", {"site": "mlp_out"}),
    "flag": ("llama", {"site": "mlp_out"}),
    "native": ("gpt2", {"site": "mlp_out"}),
    "projection": ("llama", {"site": "attn_in", "convert_site": True}),
    "fused": ("gpt2", {"site": "attn_in", "convert_site": True, "slot": "projection"}),
}


@pytest.fixture(scope="module", params=RECIPES)
def baked(request, tmp_path_factory):
    """(base, bake, options) of one way to bake, at m = 1."""
    family, options = RECIPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = build_model(folder / "base", TinyModel(family, sharded=family == "llama"))
    # A licence that asks for a NOTICE, which the base does not have and the bake is given.
    (base / "README.md").write_text("---\nlicense: gemma\n---\n# Base\n")
    direction = folder / "direction.safetensors"
    save_file(
        {"direction": torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))},
        direction,
        {"site": "mlp_out"},
    )
    options = {**options, "direction": str(direction)}
    export(str(base), output=folder / "bake", **options)
    return base, folder / "bake", options


def tensors(directory):
    found = {}
    for path in directory.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def weights(directory):
    """{file: SHA-256} of what a model is loaded from."""
    names = [path.name for path in directory.glob("model*")] + ["config.json"]
    return {name: hash_files(directory)[name]["sha256"] for name in names}


def test_undo_gives_the_base_back(baked, tmp_path):
    base, bake, _ = baked
    assert not diff(base, bake).is_empty
    found = undo(bake, output=tmp_path / "back")
    assert diff(base, tmp_path / "back").is_empty
    before, after = tensors(base), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "back/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert set(found.whole_files) == {path.name for path in base.glob("model*.safetensors")}
    for name in found.whole_files:
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "back/originals.safetensors").exists()
    assert (bake / "NOTICE").is_file()
    assert not (tmp_path / "back/NOTICE").exists()


def test_diff_lists_exactly_the_plan(baked):
    base, bake, _ = baked
    found, plan = diff(base, bake), json.loads((bake / "bake.json").read_text())["plan"]
    kinds = {}
    for change in found.tensors:
        kinds.setdefault(change.kind, set()).add(change.name)
    assert kinds.get("added", set()) == set(plan["added"])
    assert kinds.get("changed", set()) == set(plan["patched"])
    assert kinds.keys() <= {"added", "changed"}
    assert set(found.config) == {*plan["config_changes"], *plan.get("config_removed", ())}
    pushed = [c for c in found.tensors if c.norm]
    assert len(pushed) >= 1
    assert found.same_tensors == len(tensors(base)) - len(plan["patched"])


def test_rescale_is_a_fresh_export_bit_for_bit(baked, tmp_path):
    base, bake, options = baked
    export(str(base), output=tmp_path / "fresh", multiplier=-1.75, **options)
    shutil.copytree(bake, tmp_path / "rescaled")
    assert weights(tmp_path / "rescaled") != weights(tmp_path / "fresh")
    found = rescale(tmp_path / "rescaled", multiplier=-1.75)
    assert weights(tmp_path / "rescaled") == weights(tmp_path / "fresh")
    assert found.before == 1.0
    result = json.loads((tmp_path / "rescaled/bake.json").read_text())
    fresh = json.loads((tmp_path / "fresh/bake.json").read_text())
    assert result["layers"] == fresh["layers"]
    assert result["equivalence"]["verified"] is False
    card = (tmp_path / "rescaled/README.md").read_text()
    assert "**Not verified here**: the strength was changed from m = 1 after the proof. Run" in card
    rescale(tmp_path / "rescaled", multiplier=2.5)
    assert "changed from m = 1 after the proof" in (tmp_path / "rescaled/README.md").read_text()


def test_a_rescaled_bake_is_proven_by_verify(baked, tmp_path):
    base, bake, options = baked
    shutil.copytree(bake, tmp_path / "it")
    rescale(tmp_path / "it", multiplier=1.5)
    assert verify(tmp_path / "it", base=str(base)).equivalence.passed
    export(str(base), output=tmp_path / "fresh", multiplier=1.5, **options)
    recorded = json.loads((tmp_path / "it/bake.json").read_text())
    assert recorded["equivalence"]["passed"]
    assert weights(tmp_path / "it") == weights(tmp_path / "fresh")


def test_reproduce_is_byte_identical(baked):
    base, bake, _ = baked
    found = reproduce(bake, base=str(base), calibrate=True)
    assert found.identical
    assert found.drift == pytest.approx(0, abs=1e-6)
    assert set(found.same) == set(hash_files(bake))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"site": "attn_out"},
        {"site": "attn_in", "convert_site": True},
        {"site": "mlp_in", "convert_site": True},
        {"route": "insert"},
        {"dtype": "float32"},
        {"law": "flat", "multiplier": -0.75},
    ],
    ids=str,
)
def test_the_shipped_model_is_reproduced(monkeypatch, prompts_file, tmp_path, options):
    monkeypatch.setattr(
        "bake.pipeline.export.prove", passed
    )  # The proof is data here, and is tested elsewhere.
    given = {"direction": "bake-demo", "prompts": prompts_file, **options}
    export("bake-demo", output=tmp_path / "bake", **given)
    changed = diff("bake-demo", tmp_path / "bake")
    assert changed.tensors
    found = reproduce(tmp_path / "bake")
    assert found.identical, found.differing
    assert set(found.same) == set(hash_files(tmp_path / "bake"))


def test_reproduce_says_when_a_fresh_calibration_would_differ(
    monkeypatch, prompts_file, tmp_path, capsys
):
    monkeypatch.setattr("bake.pipeline.export.prove", passed)
    base = build_model(tmp_path / "base", TinyModel("llama"))
    given = {"direction": torch.arange(HIDDEN).float(), "prompts": prompts_file}
    export(str(base), output=tmp_path / "bake", **given)
    words = ["reproduce", str(tmp_path / "bake"), "--base", str(base), "--calibrate"]
    capsys.readouterr()
    assert main([*words, str(prompts_file)]) == 0
    assert "a fresh calibration gives the recorded norms" in capsys.readouterr().out
    assert main([*words, "neutral"]) == 0
    said = capsys.readouterr()
    assert "a fresh calibration would differ from the recorded norms by up to" in said.out
    assert "neutral holds other texts than those that the bake was calibrated on" in said.err
    assert main(words) == 1  # It names no set: a file's path stays where it is.
    assert "--calibrate FILE" in capsys.readouterr().err
    assert main(words[:-1]) == 0
    assert "calibration" not in capsys.readouterr().out


def test_what_a_killed_run_left_beside_a_bake_is_cleared(tmp_path):
    dead = tmp_path / ".bake-reproduce-00000000"
    (dead / "model").mkdir(parents=True)
    (dead / "model" / "shard").touch()
    (dead / "lock").touch()
    with scratch_directory(tmp_path / "bake", ".bake-reproduce-") as folder:
        assert not dead.exists()
        assert folder.parent.parent == tmp_path
        (folder / "shard").touch()
    assert not list(tmp_path.iterdir())


def test_reproduce_names_what_came_out_differently(baked, tmp_path):
    base, bake, _ = baked
    shutil.copytree(base, tmp_path / "other")
    name = next((tmp_path / "other").glob("model*.safetensors"))
    changed = load_file(name)
    first = sorted(changed)[0]
    changed[first] = changed[first] + 1
    save_file(changed, name, {"format": "pt"})
    found = reproduce(bake, base=str(tmp_path / "other"))
    assert not found.identical
    assert any(entry.startswith("model") for entry in found.differing)
    with pytest.raises(EquivalenceError, match="not reproduced: "):
        found.raise_if_different()


def test_added_layers_are_undone_and_rescaled(tmp_path):
    base = build_model(tmp_path / "base", TinyModel("llama", sharded=True))
    given = {"direction": torch.arange(HIDDEN).float(), "site": "mlp_out", "route": "insert"}
    export(str(base), output=tmp_path / "bake", **given)
    export(str(base), output=tmp_path / "half", multiplier=0.5, **given)
    layers = json.loads((tmp_path / "bake/config.json").read_text())["num_hidden_layers"]
    assert layers > json.loads((base / "config.json").read_text())["num_hidden_layers"]
    undo(tmp_path / "bake", output=tmp_path / "back")
    assert diff(base, tmp_path / "back").is_empty
    assert weights(tmp_path / "bake") != weights(tmp_path / "half")
    rescale(tmp_path / "bake", multiplier=0.5)
    assert weights(tmp_path / "bake") == weights(tmp_path / "half")


def test_given_coefficients_rescale_too(tmp_path):
    base = build_model(tmp_path / "base", TinyModel("llama"))
    given = {"direction": torch.arange(HIDDEN).float(), "coefficients": "1=0.3,2=0.7"}
    export(str(base), output=tmp_path / "a", **given)
    export(str(base), output=tmp_path / "b", multiplier=0.1, **given)
    rescale(tmp_path / "a", multiplier=0.1)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_converted_bake_cannot_be_undone(tmp_path, capsys):
    base = build_model(tmp_path / "base", TinyModel("llama", "bfloat16"))
    given = {"direction": torch.arange(HIDDEN).float(), "dtype": "float32"}
    export(str(base), output=tmp_path / "bake", **given)
    with pytest.raises(CheckpointError, match="cannot be undone: the bake changed its values"):
        undo(tmp_path / "bake", output=tmp_path / "back")
    capsys.readouterr()
    assert main(["undo", str(tmp_path / "bake"), "-o", str(tmp_path / "back")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_a_shared_shard_stays_as_it_is_where_it_is_shared(tmp_path):
    base = build_model(tmp_path / "base", TinyModel("gpt2"))
    export(str(base), output=tmp_path / "bake", direction=torch.arange(HIDDEN).float())
    shard = next((tmp_path / "bake").glob("model*.safetensors"))
    (tmp_path / "elsewhere").hardlink_to(shard)
    before = shard.read_bytes()
    rescale(tmp_path / "bake", multiplier=2)
    assert shard.read_bytes() != before
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_a_strength_of_zero_is_refused(tmp_path):
    base = build_model(tmp_path / "base", TinyModel("llama"))
    export(str(base), output=tmp_path / "bake", direction=torch.arange(HIDDEN).float())
    with pytest.raises(
        BakeError, match="must be finite and not zero; bake undo gives the base back"
    ):
        rescale(tmp_path / "bake", multiplier=0)


def test_diff_says_what_a_rename_is(tmp_path, capsys):
    base = build_model(tmp_path / "base", TinyModel("llama"))
    shutil.copytree(base, tmp_path / "other")
    name = next((tmp_path / "other").glob("model*.safetensors"))
    values = load_file(name)
    old = next(entry for entry in values if "q_proj" in entry)
    values["renamed.weight"] = values.pop(old)
    save_file(values, name, {"format": "pt"})
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    found = diff(base, tmp_path / "other")
    assert [(c.kind, c.name, c.base_name) for c in found.tensors] == [
        ("renamed", "renamed.weight", old)
    ]
    assert found.config["rms_norm_eps"][1] == 0.5
    assert main(["diff", str(base), str(tmp_path / "other")]) == 0
    assert f"was {old}, same bytes" in capsys.readouterr().out


def test_a_strength_that_the_dtype_cannot_hold_is_refused(tmp_path):
    base, bake = build_model(tmp_path / "base", TinyModel("llama")), tmp_path / "bake"
    export(str(base), output=bake, direction=torch.arange(HIDDEN).float())
    rescale(bake, multiplier=1e30)  # That much still fits.
    before = hash_files(bake)
    with pytest.raises(BakeError, match=r"multiplier 1e\+39 .* more than a float32 can hold"):
        rescale(bake, multiplier=1e39)
    assert hash_files(bake) == before
