"""A direction taken out, then a push: one checkpoint that equals both hooks, and its life afterwards."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import TinyModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bake.api import diff, estimate, export, reproduce, rescale, undo, verify
from bake.cli.main import main
from bake.errors import BakeError, CheckpointError

WIDTH, LAYERS = 32, 6
IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(2))
DRAWN = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9))
UNIT, OTHER = torch.nn.functional.normalize(DRAWN, dim=-1)
# Embeddings, layers and blocks that write, by hand.
PARTS = {
    "llama": (("model.embed_tokens",), "model.layers", ("self_attn", "mlp")),
    "gpt2": (("transformer.wte", "transformer.wpe"), "transformer.h", ("attn", "mlp")),
}

PUSHED = {
    "llama": {"mlp_out": "", "attn_out": ".self_attn", "attn_in": ".input_layernorm"},
    "gpt2": {"mlp_out": "", "attn_out": ".attn"},
}


def load(directory):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@contextmanager
def hooked(model, architecture, unit, push=None, site="mlp_out"):
    """Every write loses its part along `unit`; then each layer's output is pushed."""

    def change(function):
        def after(_module, _arguments, output):
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        return after

    def erase(x):
        return x - (x @ unit)[..., None] * unit

    embeddings, path, blocks = PARTS[architecture]
    with ExitStack() as stack:
        names = [*embeddings]
        names += [f"{path}.{layer}.{block}" for layer in range(LAYERS) for block in blocks]
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(change(erase))
            stack.callback(handle.remove)
        pushed = PUSHED[architecture][site]
        for layer, vector in (push or {}).items():
            module = model.get_submodule(f"{path}.{layer}{pushed}")
            handle = module.register_forward_hook(change(lambda x, added=vector: x + added))
            stack.callback(handle.remove)
        yield


def push_of(directory):
    """The push that bake.json records, read without bake."""
    record = json.loads((directory / "bake.json").read_text())
    vectors = load_file(directory / "direction.safetensors")
    return {
        entry["layer"]: record["multiplier"]
        * entry["coefficient"]
        * vectors.get(f"direction.{entry['layer']}", vectors.get("direction"))
        for entry in record["layers"]
    }


def error_of(base, output, architecture, site):
    """max|baked − hooked| / max|hooked − base|, after showing that each of the two does something."""
    model = load(base)
    plain = logits(model)
    push = push_of(output)
    with hooked(model, architecture, UNIT):
        ablated = logits(model)
    with hooked(model, architecture, UNIT, push, site):
        wanted = logits(model)
    assert (ablated - plain).abs().max() > 0.05 * plain.std()
    assert (wanted - ablated).abs().max() > 0.05 * plain.std()
    return float((logits(load(output)) - wanted).abs().max() / (wanted - plain).abs().max())


CELLS = [
    (TinyModel("llama", tied=True), "mlp_out"),
    (TinyModel("llama", sharded=True), "attn_out"),
    (TinyModel("llama", tied=True), "attn_in"),
    (TinyModel("gpt2", tied=True), "mlp_out"),  # whose biases lose their part, and are pushed
    (TinyModel("gpt2", tied=True), "attn_out"),
]


@pytest.mark.parametrize("pushed", [UNIT, OTHER], ids=["affine", "another"])
@pytest.mark.parametrize(("cell", "site"), CELLS)
def test_the_reloaded_model_is_the_one_that_was_hooked_twice(
    cell, site, pushed, make_model, tmp_path
):
    base, output = make_model(cell), tmp_path / "out"
    direction = tmp_path / "direction.safetensors"
    save_file({"direction": pushed.clone()}, direction, {"site": site})
    result = export(
        base, direction=direction, ablate=UNIT, multiplier=1.0, output=output, site=site
    )
    assert result.equivalence.passed
    assert error_of(base, output, cell.architecture, site) <= 1e-4
    torch.testing.assert_close(
        load_file(output / "removed.safetensors")["direction"], UNIT, rtol=0, atol=1e-6
    )


@pytest.fixture(scope="module")
def both(make_model, tmp_path_factory):
    """A base in bfloat16, and what it was made: without UNIT, pushed along OTHER."""
    base = make_model(TinyModel("llama", "bfloat16", tied=True))
    output = tmp_path_factory.mktemp("both") / "out"
    result = export(base, direction=OTHER, ablate=UNIT, multiplier=1.0, output=output)
    return base, output, result


def test_norms_are_those_of_what_is_left(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    options = {"direction": UNIT, "multiplier": 1.0}
    alone = export(base, **options, output=tmp_path / "alone")
    result = export(base, **options, ablate=UNIT, output=tmp_path / "both")
    pairs = zip(alone.push.layers, result.push.layers, strict=True)
    assert all(one.activation_norm != other.activation_norm for one, other in pairs)


def test_the_card_and_the_record_say_both(both):
    _, output, result = both
    record = json.loads((output / "bake.json").read_text())
    assert record["ablation"] == {
        "scope": "stream", "strength": 1.0, "rank": 1, "layers": list(range(LAYERS)),
    }  # fmt: skip
    assert [entry["file"] for entry in record["removed"]] == ["removed.safetensors"]
    assert "lm_head.weight" in record["plan"]["added"]
    assert "model.embed_tokens.weight" in record["plan"]["patched"]
    assert record["plan"]["config_changes"]["tie_word_embeddings"] is False
    assert record["plan"]["config_changes"]["mlp_bias"] is True
    card = (output / "README.md").read_text()
    assert "removed.safetensors" in card
    assert "taken out of the residual stream" in card
    assert result.to_dict()["removed"][0]["site"] == "mlp_out"


def test_it_is_verified_and_reproduced(both):
    base, output, _ = both
    assert verify(output, base=base).equivalence.passed
    assert reproduce(output, base=base).identical


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("model.embed_tokens.weight", "bit for bit"),
        ("model.layers.2.mlp.down_proj.bias", "bit for bit"),
        ("model.layers.0.self_attn.o_proj.weight", "bit for bit"),
    ],
)
def test_a_changed_tensor_is_found(both, tmp_path, tensor, says):
    base, output, _ = both
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    shard = next(path for path in copy.glob("*.safetensors") if tensor in _tensors(path))
    values = load_file(shard)
    values[tensor] += 0.01
    save_file(values, shard, {"format": "pt"})
    failures = verify(copy, base=base).equivalence.failures
    assert any(says in failure for failure in failures)


def _tensors(path):
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_the_ways_back_say_what_they_cannot(both, make_model, tmp_path):
    base, output, _ = both
    with pytest.raises(CheckpointError, match="cannot be undone"):
        undo(output, output=tmp_path / "undone")
    found = diff(base, output)
    assert any("down_proj.bias" in str(entry) for entry in found.to_dict().values())
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    rescale(copy, multiplier=0.5)
    again = export(base, direction=OTHER, ablate=UNIT, multiplier=0.5, output=tmp_path / "again")
    assert again.equivalence.passed
    name = "model.layers.3.mlp.down_proj.bias"
    stored = [
        next(load_file(p)[name] for p in sorted(d.glob("*.safetensors")) if name in _tensors(p))
        for d in (copy, tmp_path / "again")
    ]
    assert torch.equal(*stored)


def test_a_bias_that_lost_its_part_is_not_rescaled(make_model, tmp_path):
    base = make_model(TinyModel("gpt2", tied=True))
    export(base, direction=OTHER, ablate=UNIT, multiplier=1.0, output=tmp_path / "out")
    with pytest.raises(BakeError, match="export again"):
        rescale(tmp_path / "out", multiplier=0.5)


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("mixtral", {}, "bake ablate"),
        ("llama", {"ablate_layer": 3}, "leave it out"),
        ("llama", {"ablate": None, "ablate_layer": 3}, "give --ablate FILE"),
        ("llama", {"thin": True, "calibration": "none"}, "--thin cannot go with --ablate"),
    ],
)
def test_what_cannot_be_is_refused(make_model, tmp_path, architecture, options, says):
    base = make_model(TinyModel(architecture))
    given = {"direction": OTHER, "ablate": UNIT, "multiplier": 1.0, **options}
    with pytest.raises(BakeError, match=says):
        export(base, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_the_weights_is_no_weights_of_the_next_bake(both, tmp_path):
    _, output, _ = both
    result = export(output, direction=OTHER, multiplier=0.5, output=tmp_path / "again")
    record = json.loads((tmp_path / "again" / "bake.json").read_text())
    assert "left_out" not in record
    assert result.equivalence.passed
    assert not (tmp_path / "again" / "removed.safetensors").exists()


def test_an_estimate_does_not_leave_it_out_silently(make_model):
    base = make_model(TinyModel("llama"))
    with pytest.raises(BakeError, match="--estimate does not count what --ablate rewrites"):
        estimate(base, ablate=UNIT, direction=OTHER)


def test_the_command_takes_files(make_model, tmp_path, capsys):
    base = make_model(TinyModel("llama", tied=True))
    files = {}
    for name, vector in (("away", UNIT), ("along", OTHER)):
        files[name] = tmp_path / f"{name}.safetensors"
        save_file({"direction": vector.clone()}, files[name], {"site": "mlp_out"})
    words = ["export", base, "--direction", files["along"], "--ablate", files["away"]]
    code = main([str(word) for word in (*words, "-m", "1", "-o", tmp_path / "out")])
    assert code == 0
    assert "first one direction taken out of the residual stream" in capsys.readouterr().out
