"""Estimates: exact where the layout decides, without weights, without a trace on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from canned import passed
from conftest import TinyModel
from safetensors.torch import save_file

from bake.api import estimate, export
from bake.checkpoint.checkpoint import Checkpoint
from bake.cli.main import main
from bake.errors import BakeError, DirectionError, OutputError, UnsupportedError
from bake.io.safetensors import TensorSpec, encode_header
from bake.pipeline import export as pipeline

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "attention_bias": False,
}


def llama_shapes(config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama, written down by hand."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    vocabulary = config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (width, width),
                "self_attn.k_proj": (keys, width),
                "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width),
                "mlp.up_proj": (inner, width),
                "mlp.down_proj": (width, inner),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
            }.items()
        }
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def write_sparse(directory: Path, config, shards: int) -> Path:
    """A checkpoint of sound headers whose data are holes: it takes no room on the disk."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names = llama_shapes(config)
    listed = list(names)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = listed[number * len(listed) // shards : (number + 1) * len(listed) // shards]
        specs = [TensorSpec(name, "BF16", names[name]) for name in held]
        header = encode_header(specs, {"format": "pt"})
        with (directory / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(spec.size for spec in specs))
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    directory = write_sparse(tmp_path_factory.mktemp("huge") / "405B", LLAMA_405B, 191)
    used = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
    if used > 100e6:
        pytest.skip("this file system has no sparse files")
    return directory


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Estimates must not read a weight; tests that export take this back."""

    def refuse(self, *arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "_read_range", refuse)
    return monkeypatch


def by_kind(found) -> dict[str, tuple[int, int]]:
    return {entry.kind: (entry.files, entry.bytes) for entry in found.files}


def test_405_billion_parameters(huge):
    found = estimate(str(huge), pairs="toy-cheerful-gloomy")
    assert found.parameters == 405_853_388_800  # the model card's 405B
    assert found.base_bytes == 2 * found.parameters
    assert (found.site, found.route) == ("mlp_out", "flag")
    assert found.config_changes == {"mlp_bias": True}
    assert found.layers == tuple(range(50, 113))
    kinds = by_kind(found)
    assert kinds["kept"] == (191, sum(path.stat().st_size for path in huge.glob("*.safetensors")))
    biases = 126 * (2 * 53248 + 16384) * 2
    assert kinds["new"][0] == 1
    assert biases < kinds["new"][1] < biases + 60_000
    assert set(kinds) == {"kept", "new"}
    assert found.write_bytes == kinds["kept"][1] + kinds["new"][1]
    assert found.cloned_bytes == kinds["kept"][1]
    assert 1.62e12 < found.memory_whole < 1.63e12  # 4 bytes a parameter
    layer = (found.parameters - 2 * 128256 * 16384) / 126
    assert found.memory_streamed == pytest.approx(4 * (layer + 2 * 128256 * 16384), rel=0.2)
    stages = ["direction", "calibrate", "choose the multiplier", "prove"]
    assert [entry.stage for entry in found.passes] == stages
    assert found.seconds_streamed > found.forwards * 811 * 0.9


def test_links_and_thin_bakes_write_only_what_is_new(huge):
    copied = estimate(str(huge))
    new = by_kind(copied)["new"][1]
    linked = estimate(str(huge), shards="symlink")
    assert (linked.write_bytes, linked.cloned_bytes) == (new, 0)
    assert linked.upload_bytes == copied.upload_bytes
    thin = estimate(str(huge), thin=True)
    assert (thin.write_bytes, thin.passes) == (new, ())
    assert new < thin.upload_bytes < new + 100_000
    assert thin.memory_whole < 1e9
    assert thin.seconds_whole < 60


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (TinyModel(sharded=True), {}),
        (TinyModel(dtype="bfloat16"), {}),
        (TinyModel("gpt2", sharded=True), {}),
        (TinyModel(sharded=True), {"site": "attn_in", "convert_site": True}),
        (TinyModel(dtype="bfloat16", sharded=True), {"dtype": "float32"}),
    ],
    ids=["sharded", "single", "patched", "projection", "float32"],
)
def test_the_files_are_those_that_the_export_writes(
    make_model, tmp_path, prompts_file, monkeypatch, model, options
):
    base = make_model(model)
    direction = tmp_path / "direction.safetensors"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(7))
    save_file({"direction": vector}, direction, metadata={"site": "mlp_out"})
    options = {**options, "direction": direction, "prompts": prompts_file}
    found = estimate(str(base), **options)
    monkeypatch.undo()
    monkeypatch.setattr("bake.pipeline.export.prove", passed)
    result = export(str(base), output=tmp_path / "out", **options)
    sizes = {name: entry["size"] for name, entry in result.files.items()}
    weights = {
        name: size
        for name, size in sizes.items()
        if name.endswith(".safetensors") and name != "direction.safetensors"
    }
    assert sum(entry.bytes for entry in found.files) == sum(weights.values())
    assert sum(entry.files for entry in found.files) == len(weights)
    assert (found.site, found.route) == (result.plan.route.site, result.plan.route.route)
    assert found.config_changes == dict(result.plan.route.flags)
    assert found.layers == tuple(entry.layer for entry in result.push.layers)
    assert sum(sizes.values()) - found.upload_bytes < 100_000  # index, card, direction, figure


def test_the_table_and_the_json_and_nothing_on_the_disk(huge, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = hash_names(huge)
    assert main(["export", str(huge), "--estimate", "--pairs", "toy-cheerful-gloomy"]) == 0
    text = capsys.readouterr().out
    for part in ("406 billion parameters", "812 GB", "mlp_bias = True", "kept", "191", "layer by layer",
                 "forward passes to prove", "assumed: ", "days"):  # fmt: skip
        assert part in text, part
    assert main(["export", str(huge), "--estimate", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["base"]["id"], values["base"]["revision"]) == ("405B", None)
    assert values["forwards"] == sum(entry["forwards"] for entry in values["passes"])
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())
    assert hash_names(huge) == before


def hash_names(directory: Path) -> list[tuple[str, int]]:
    return sorted((path.name, path.stat().st_size) for path in directory.iterdir())


def test_what_an_export_would_refuse_is_refused(huge, make_model, tmp_path):
    narrow = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(32)}, narrow, metadata={"site": "mlp_out"})
    with pytest.raises(DirectionError, match="16384"):
        estimate(str(huge), direction=narrow)
    with pytest.raises(BakeError, match="one of copy"):
        estimate(str(huge), shards="clone")
    with pytest.raises(BakeError, match="--thin cannot go with --dtype"):
        estimate(str(huge), thin=True, dtype="float32")
    with pytest.raises(UnsupportedError, match="cannot be baked thin"):
        estimate(str(make_model(TinyModel("gpt2"))), thin=True)
    with pytest.raises(BakeError, match="no model is given"):
        estimate("")


def test_old_weights_are_described_without_a_conversion(llama, tmp_path, no_weights):
    from pickled_models import pickle_weights

    (tmp_path / "temporary").mkdir()
    no_weights.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    old = estimate(str(pickle_weights(llama, tmp_path / "old")))
    assert by_kind(old)["new"] == by_kind(estimate(str(llama)))["new"]
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(OutputError, match="leave --shards out"):
        estimate(str(tmp_path / "old"), shards="symlink")


def test_the_proof_runs_as_many_forwards_as_was_said(
    make_model, tmp_path, prompts_file, no_weights
):
    """Counted in this process; the plain one's are what it is asked for: a text each, and a token each."""
    from torch.nn.modules import module
    from transformers import PreTrainedModel

    from bake.proof.observation import CANARIES, NEW_TOKENS

    direction = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(32)}, direction, metadata={"site": "mlp_out"})
    options = {"direction": direction, "prompts": prompts_file}
    base = make_model(TinyModel())
    (said,) = (entry for entry in estimate(str(base), **options).passes if entry.stage == "prove")
    no_weights.undo()
    forwards = 0

    def count(called, _arguments):
        nonlocal forwards
        forwards += (
            isinstance(called, PreTrainedModel) and called.get_output_embeddings() is not None
        )

    real = pipeline.prove

    def counted(*arguments, **options):
        handle = module.register_module_forward_pre_hook(count)
        try:
            return real(*arguments, **options)
        finally:
            handle.remove()

    no_weights.setattr(pipeline, "prove", counted)
    proof = export(str(base), output=tmp_path / "out", **options).equivalence
    assert proof.scaled_by == 1.0  # a push whose effect is small costs a few passes more
    assert forwards + CANARIES + NEW_TOKENS == said.forwards
