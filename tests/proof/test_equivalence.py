"""The proof passes what is right and catches every kind of wrong, with the right name for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PAIRS, TinyModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bake.api import export, verify
from bake.errors import BakeError, EquivalenceError
from bake.sites import Slot

EXTRA = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def direction_file(tmp_path_factory) -> Path:
    """One random direction of the tiny models' width, for all layers."""
    from bake.directions.direction import Direction, normalise
    from bake.directions.direction_file import direction_bytes

    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(9))
    path.write_bytes(direction_bytes(Direction({None: normalise(vector, "d")}, "mlp_out")))
    return path


@pytest.fixture(scope="module")
def baked(llama, direction_file, prompts_file, tmp_path_factory) -> Path:
    """A good bake of the float32 Llama at mlp_out."""
    output = tmp_path_factory.mktemp("baked") / "out"
    export(str(llama), direction=direction_file, prompts=prompts_file, output=output)
    return output


def test_a_good_bake_verifies(baked, llama):
    found = verify(baked, base=str(llama)).equivalence
    assert found.passed
    assert found.effect > 0.1
    assert 0.9 < found.plain_effect < 1.1
    assert found.mechanism_error <= 1e-4
    assert found.relative_error <= 1e-4
    assert found.loading_info_clean
    assert found.loading_info == {k: [] for k in found.loading_info}
    assert found.canary is not None
    assert found.canary.base != found.canary.baked


def test_greedy_is_greedy_whatever_the_base_says_of_generation(
    llama, direction_file, prompts_file, tmp_path
):
    """Qwen 2.5's own settings sample and penalise repetition; a canary made so would tell of nothing."""
    import shutil

    base = Path(shutil.copytree(llama, tmp_path / "base"))
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.5}
    (base / "generation_config.json").write_text(json.dumps(settings))
    options = {"direction": direction_file, "prompts": prompts_file}
    asked = export(str(llama), output=tmp_path / "plain", **options).equivalence
    found = export(str(base), output=tmp_path / "penalised", **options).equivalence
    assert asked.canary is not None
    assert found.canary == asked.canary
    assert found.greedy_equal_stored


def test_a_canary_ends_where_a_server_would_end_it(baked, llama, monkeypatch):
    from bake.proof import equivalence

    real = equivalence.run_plain

    def ends_early(*arguments):
        found = real(*arguments)
        cut = [[*ids[:3], 2, *ids[3:]] for ids in found.continuations]  # </s>
        return replace(found, continuations=cut)

    whole = verify(baked, base=str(llama)).equivalence.canary
    monkeypatch.setattr(equivalence, "run_plain", ends_early)
    cut = verify(baked, base=str(llama)).equivalence.canary
    assert whole is not None
    assert cut is not None
    assert len(cut.baked) < len(whole.baked)
    assert whole.baked.startswith(cut.baked.rstrip("\ufffd"))


def test_verify_names_the_base_it_needs(baked):
    with pytest.raises(BakeError, match="--base"):
        verify(baked)


@pytest.fixture
def copy(baked, tmp_path) -> Path:
    """A copy of the good bake, to be damaged."""
    import shutil

    return Path(shutil.copytree(baked, tmp_path / "damaged"))


def edit_shard(path: Path, change) -> None:
    """Rewrite a safetensors file with its tensors changed in place by `change`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def drop_the_flag(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["mlp_bias"] is True
    config["mlp_bias"] = False
    (directory / "config.json").write_text(json.dumps(config))


def scale_by_one_per_cent(directory: Path) -> None:
    def change(tensors):
        for name in tensors:
            tensors[name] *= 1.01

    edit_shard(directory / EXTRA, change)


def move_to_another_layer(directory: Path) -> None:
    def change(tensors):
        name = "model.layers.{}.mlp.down_proj.bias".format
        assert tensors[name(2)].any()
        assert not tensors[name(1)].any()
        tensors[name(1)], tensors[name(2)] = tensors[name(2)], tensors[name(1)]

    edit_shard(directory / EXTRA, change)


def leave_the_extra_shard_out(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {k: v for k, v in values["weight_map"].items() if v != EXTRA}
    index.write_text(json.dumps(values))


def point_the_index_elsewhere(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    name = next(k for k, v in values["weight_map"].items() if v == EXTRA)
    values["weight_map"][name] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))


def store_a_tensor_twice(directory: Path) -> None:
    name = "model.layers.2.mlp.down_proj.bias"
    edit_shard(
        directory / "model-00001-of-00002.safetensors",
        lambda tensors: tensors.update({name: torch.zeros(32)}),
    )


def change_a_base_tensor(directory: Path) -> None:
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1

    edit_shard(directory / "model-00001-of-00002.safetensors", change)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_the_flag, "base model.*unexpected keys model.layers.0.mlp"),
        (scale_by_one_per_cent, "not cast\\(old \\+ push\\)"),
        (move_to_another_layer, "not cast\\(old \\+ push\\)"),
        (leave_the_extra_shard_out, "missing keys model.layers.0.mlp"),
        (point_the_index_elsewhere, "index"),
        (store_a_tensor_twice, "model.layers.2.mlp.down_proj.bias"),
        (change_a_base_tensor, "model.layers.0.mlp.up_proj.weight is not the base's"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_catches(copy, llama, damage, says):
    damage(copy)
    with pytest.raises(BakeError, match=says):
        verify(copy, base=str(llama)).equivalence.raise_if_failed()


def test_a_file_that_changed_is_named(copy, llama):
    readme = copy / "README.md"
    readme.write_text(readme.read_text() + "more\n")
    found = verify(copy, base=str(llama)).equivalence
    assert len(found.failures) == 1
    assert "README.md" in found.failures[0]


def test_verify_with_another_base_fails(baked, make_model):
    other = make_model(seed=1)
    failures = verify(baked, base=str(other)).equivalence.failures
    assert any("is not the base's" in failure for failure in failures)


def test_dropped_biases_leave_no_directory(
    llama, direction_file, prompts_file, tmp_path, monkeypatch
):
    """The classic failure: biases are written, the flag that makes them count is not."""
    from bake.pipeline import export as pipeline

    real = pipeline.write_config
    monkeypatch.setattr(pipeline, "write_config", lambda base, _changes, to: real(base, {}, to))
    output = tmp_path / "out"
    with pytest.raises(EquivalenceError, match="the reloaded model is the base model") as caught:
        export(str(llama), direction=direction_file, prompts=prompts_file, output=output)
    assert "unexpected keys" in str(caught.value)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def loud_gpt2(make_model) -> Path:
    """A bfloat16 GPT-2 whose c_attn biases have rms 10: they drown a push that is added to them."""
    return make_model(TinyModel("gpt2", "bfloat16", loud_biases="c_attn.bias"))


@pytest.fixture
def options(pairs_file, prompts_file, tmp_path):
    """Options of a bake at attn_in through c_attn's bias."""
    return {
        "pairs": pairs_file,
        "prompts": prompts_file,
        "output": tmp_path / "out",
        "site": "attn_in",
        "slot": "projection",
    }


def test_a_drowned_push_is_a_representation_error(loud_gpt2, options, tmp_path):
    with pytest.raises(EquivalenceError) as caught:
        export(str(loud_gpt2), **options)
    message = str(caught.value)
    assert "representation: bfloat16" in message
    assert "mechanism" not in message
    assert "--dtype float32" in message
    assert "--allow-rounding" in message
    assert list(tmp_path.iterdir()) == []


def test_float32_holds_what_bfloat16_drowns(loud_gpt2, options):
    result = export(str(loud_gpt2), dtype="float32", **options)
    assert result.equivalence.passed
    assert result.equivalence.representation_error < 1e-4
    weights = list(options["output"].glob("model*.safetensors"))
    dtypes = {str(t.dtype) for path in weights for t in load_file(path).values()}
    assert dtypes == {"torch.float32"}
    config = json.loads((options["output"] / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert verify(options["output"], base=str(loud_gpt2)).equivalence.passed


def test_rounding_can_be_accepted_knowingly(loud_gpt2, options):
    result = export(str(loud_gpt2), allow_rounding=True, **options)
    found = result.equivalence
    assert found.passed
    assert found.relative_error > found.tolerance
    assert found.representation_error > 0.02
    assert any("rounding accepted" in warning for warning in found.warnings)
    assert "exceeded, accepted" in (options["output"] / "README.md").read_text()


def test_a_wrong_matrix_is_a_mechanism_error(loud_gpt2, options, monkeypatch, tmp_path):
    real = Slot.delta

    def wrong(self, push, weight=None, shape=None):
        return real(self, push, None if weight is None else weight.flip(0), shape)

    monkeypatch.setattr(Slot, "delta", wrong)
    # The twin would refuse the route; here the mistake is to be found by the proof alone.
    monkeypatch.setattr("bake.anatomy.twin.TwinVerdict.passed", True)
    with pytest.raises(EquivalenceError) as caught:
        export(str(loud_gpt2), **options)
    assert "mechanism: hooked and baked differ" in str(caught.value)
    assert "representation" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_twin_refuses_a_wrong_matrix(make_model, monkeypatch, examined_anew):
    from bake.api import inspect

    real = Slot.delta
    monkeypatch.setattr(
        Slot, "delta", lambda self, p, w, s: real(self, p, None if w is None else w.flip(0), s)
    )
    anatomy = inspect(str(make_model()))
    assert "attn_in" in anatomy.refusals
    assert "differs from the hook" in anatomy.refusals["attn_in"]


def test_a_small_push_is_proven_at_a_visible_size(llama, direction_file, prompts_file, tmp_path):
    result = export(
        str(llama),
        direction=direction_file,
        prompts=prompts_file,
        output=tmp_path / "out",
        multiplier=1e-4,
    )
    found = result.equivalence
    assert found.effect < 1e-2
    assert found.scaled_by > 10
    assert found.mechanism_error <= 1e-4


def files_below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_two_runs_write_the_same_bytes(baked, llama, direction_file, prompts_file, tmp_path):
    export(str(llama), direction=direction_file, prompts=prompts_file, output=tmp_path / "again")
    names = files_below(baked)
    assert names == files_below(tmp_path / "again")
    for name in names:
        assert (baked / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_bake_json_keeps_the_contract(baked, llama):
    values = json.loads((baked / "bake.json").read_text())
    assert values["version"] == 1
    assert values["base"].keys() == {"id", "revision", "headers_sha256"}
    assert (values["base"]["id"], values["base"]["revision"]) == (llama.name, None)
    assert (values["site"], values["route"], values["law"]) == ("mlp_out", "flag", "inverse-sqrt-d")
    assert values["band"] == [2, 5]
    assert [entry["layer"] for entry in values["layers"]] == [2, 3, 4]
    for entry in values["layers"]:
        assert entry["coefficient"] == pytest.approx(entry["activation_norm"] / 32**0.5)
    assert values["equivalence"]["passed"] is True
    assert set(values["files"]) == files_below(baked) - {"bake.json"}
    assert str(llama) not in (baked / "bake.json").read_text()
    assert "/" not in values["base"]["id"]


def test_slots_hold_the_recorded_push(baked):
    values = json.loads((baked / "bake.json").read_text())
    direction = load_file(baked / "direction.safetensors")
    stored = load_file(baked / EXTRA)
    for entry in values["layers"]:
        expected = direction[f"direction.{entry['layer']}"].double() * entry["coefficient"]
        found = stored[f"model.layers.{entry['layer']}.mlp.down_proj.bias"]
        assert torch.equal(found, expected.float())


def test_damaged_bake_json_is_one_line(copy, llama):
    (copy / "bake.json").write_text("{")
    with pytest.raises(BakeError, match="is not JSON"):
        verify(copy, base=str(llama))
    (copy / "bake.json").unlink()
    with pytest.raises(BakeError, match=r"has no bake\.json"):
        verify(copy, base=str(llama))


def test_pairs_are_enough(llama, pairs_file, prompts_file, tmp_path):
    result = export(str(llama), pairs=pairs_file, prompts=prompts_file, output=tmp_path / "out")
    assert result.direction.metadata["pairs"] == str(len(PAIRS))
    assert result.equivalence.passed


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_residual_direction_is_converted_to_an_input(
    make_model, direction_file, prompts_file, tmp_path, architecture
):
    """û ← normalise(norm weight ⊙ û), announced, and folded as exactly as any other."""
    base = make_model(TinyModel(architecture))
    options = {"direction": direction_file, "prompts": prompts_file, "site": "mlp_in"}
    with pytest.raises(BakeError, match="--convert-site"):
        export(str(base), output=tmp_path / "out", **options)
    result = export(str(base), output=tmp_path / "out", convert_site=True, **options)
    assert result.equivalence.passed
    norm = {"llama": "model.layers.3.post_attention_layernorm", "gpt2": "transformer.h.3.ln_2"}
    weight = load_file(base / "model.safetensors")[f"{norm[architecture]}.weight"]
    given = load_file(direction_file)["direction"]
    expected = torch.nn.functional.normalize(weight * given, dim=0)
    found = load_file(tmp_path / "out" / "direction.safetensors")["direction.3"]
    assert float(expected @ given) < 0.999  # The norm's weight turns the direction.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_verify_catches_a_transposed_matrix(make_model, pairs_file, prompts_file, tmp_path):
    """q_proj is square here, so Wᵀ·v fits where W·v belongs."""
    base = make_model(TinyModel("llama"))
    out = tmp_path / "out"
    export(str(base), pairs=pairs_file, prompts=prompts_file, output=out, site="attn_in")
    assert verify(out, base=str(base)).equivalence.passed
    matrix = load_file(base / "model.safetensors")["model.layers.3.self_attn.q_proj.weight"]
    assert matrix.shape[0] == matrix.shape[1]
    recorded = json.loads((out / "bake.json").read_text())
    alpha = next(e["coefficient"] for e in recorded["layers"] if e["layer"] == 3)
    unit = load_file(out / "direction.safetensors")["direction.3"]
    push = (unit.double() * alpha).float().double()
    name = "model.layers.3.self_attn.q_proj.bias"
    assert torch.equal(load_file(out / EXTRA)[name], (matrix.double() @ push).float())
    edit_shard(out / EXTRA, lambda t: t.update({name: (matrix.double().T @ push).float()}))
    failures = verify(out, base=str(base)).equivalence.failures
    assert any("not cast(old + push)" in failure for failure in failures)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensor: tensor * 1.01, "not cast"),
        (lambda tensor: tensor.flip(0), "not cast"),
    ],
    ids=["wrong scale", "wrong order"],
)
def test_verify_catches_a_wrong_patch(make_model, pairs_file, prompts_file, tmp_path, change, says):
    """GPT-2's slots exist already; what is checked is old + push, in the stored dtype."""
    base = make_model(TinyModel("gpt2", "bfloat16"))
    out = tmp_path / "out"
    export(str(base), pairs=pairs_file, prompts=prompts_file, output=out, site="mlp_out")
    name = "transformer.h.3.mlp.c_proj.bias"
    (shard,) = out.glob("model*.safetensors")
    before = load_file(shard)[name]
    assert not torch.equal(before, change(before))
    edit_shard(shard, lambda tensors: tensors.update({name: change(before)}))
    failures = verify(out, base=str(base)).equivalence.failures
    assert any(says in failure for failure in failures)
