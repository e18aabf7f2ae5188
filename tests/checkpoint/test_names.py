"""Names on disk: transformers' own rules, asked for one parameter at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, TinyModel, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bake.anatomy import examine
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.errors import CheckpointError, UnsupportedError
from bake.models.forward import compute_logits, load_model, read_config
from bake.models.streaming import Placement
from bake.plan.plan import make_plan
from bake.strength.coefficients import LayerPush, Push
from bake.texts.prompts import encode, load_tokenizer, make_batches

MIXTURES = {
    "mixtral": {"num_local_experts": 11, "num_experts_per_tok": 2, "intermediate_size": 40},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Return a function: model type → a checkpoint as save_pretrained writes it, experts one by one."""
    built: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in built:
            directory = tmp_path_factory.mktemp(model_type)
            config = AutoConfig.for_model(
                model_type,
                vocab_size=259,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                **MIXTURES[model_type],
            )
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
                directory
            )
            byte_tokenizer().save_pretrained(directory)
            built[model_type] = directory
        return built[model_type]

    return make


def names_of(directory: Path) -> DiskNames:
    return DiskNames(open_checkpoint(str(directory)), build_on_meta(read_config(directory)))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_parameter_is_read_as_from_pretrained_loads_it(mixture, model_type):
    directory = mixture(model_type)
    names = names_of(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert names.fusions  # The experts: several tensors become one parameter.
    for name, parameter in model.named_parameters():
        assert torch.equal(names.read(name), parameter), name
        assert names.shape(name) == tuple(parameter.shape), name
    assert names.unexpected == []


def test_a_merged_parameter_knows_its_sources_and_cannot_be_patched(mixture):
    names = names_of(mixture("mixtral"))
    merged = "model.layers.1.mlp.experts.down_proj"
    # Expert 10 comes after expert 9, not after expert 1.
    assert names.sources(merged) == tuple(
        f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(11)
    )
    assert names.find(merged) is None
    with pytest.raises(UnsupportedError, match=r"makes it of 11 tensors such as .*experts\.0\.w2"):
        names.existing(merged)
    with pytest.raises(CheckpointError, match="is the checkpoint complete"):
        names.existing("model.layers.9.mlp.experts.down_proj")


@pytest.mark.parametrize("model_type", MIXTURES)
def test_merged_experts_are_streamed(mixture, model_type):
    directory = mixture(model_type)
    whole = load_model(directory)
    batches = make_batches(encode(load_tokenizer(directory), PROMPTS))
    expected = torch.cat(compute_logits(whole, batches))
    streamed = load_model(directory, placement=Placement({"cpu": 1_000}))
    experts = streamed.model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert experts.device.type == "meta"
    assert streamed.report == whole.report
    assert torch.equal(torch.cat(compute_logits(streamed, batches)), expected)


def test_one_stored_tensor_that_becomes_several_parameters(make_model, tmp_path, monkeypatch):
    """No stock causal model is stored so, but transformers can split, and so can its wrappers."""
    from transformers import conversion_mapping, modeling_utils
    from transformers.core_model_loading import Chunk, WeightConverter

    source = make_model(TinyModel("llama"))
    tensors = load_file(source / "model.safetensors")
    for layer in range(6):
        prefix = f"model.layers.{layer}.mlp"
        halves = [tensors.pop(f"{prefix}.{half}_proj.weight") for half in ("gate", "up")]
        tensors[f"{prefix}.both.weight"] = torch.cat(halves)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    original = conversion_mapping.get_model_conversion_mapping

    def with_split(model, *arguments, **options):
        split = WeightConverter(
            ".mlp.both.weight",
            [".mlp.gate_proj.weight", ".mlp.up_proj.weight"],
            operations=[Chunk(dim=0)],
        )
        return [*original(model, *arguments, **options), split]

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", with_split)
    monkeypatch.setattr(modeling_utils, "get_model_conversion_mapping", with_split)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = read_config(tmp_path)
    config.mlp_bias = True
    names = DiskNames(open_checkpoint(str(tmp_path)), build_on_meta(config))
    up = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(names.read(up), model.get_parameter(up))
    assert not torch.equal(names.read(up), names.read(up.replace("up_proj", "gate_proj")))
    with pytest.raises(UnsupportedError, match="cannot be patched"):
        names.new_bias(up)  # It is there, made of something else: not to be added a second time.
    # There is no `both.bias`: the new bias goes by the module's own name.
    assert names.new_bias("model.layers.2.mlp.up_proj.bias") == (
        "model.layers.2.mlp.up_proj.bias",
        "model.layers.2.mlp.both.weight",
    )


def test_a_new_bias_lies_beside_its_weight_and_is_read_back(make_model, tmp_path):
    """GPT-2's files of long ago have no `transformer.`, and a bias that does not exist has no name."""
    source = make_model(TinyModel("llama"))
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mlp_bias": True}))
    names = names_of(tmp_path)
    assert names.new_bias("model.layers.2.mlp.down_proj.bias") == (
        "layers.2.mlp.down_proj.bias",
        "layers.2.mlp.down_proj.weight",
    )
    (tmp_path / "config.json").write_text(
        json.dumps(config)
    )  # The flag is off: it would be dropped.
    with pytest.raises(UnsupportedError, match="would be dropped"):
        names_of(tmp_path).new_bias("model.layers.2.mlp.down_proj.bias")


def test_a_bias_on_disk_that_the_base_drops_is_named(make_model, tmp_path):
    """A bake by other means, which reloads as its base: the flag would bring the old push to life."""
    base = make_model(architecture="llama")
    tensors = load_file(base / "model.safetensors")
    stray = "model.layers.2.mlp.down_proj.bias"
    tensors[stray] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).report["unexpected_keys"] == [stray]
    anatomy = examine(read_config(tmp_path))
    push = Push("explicit", 1.0, (1, 2), 32, (LayerPush(1, 1.0, 1.0),), {1: torch.ones(32)})
    with pytest.raises(CheckpointError, match=f"holds {stray}, which its architecture does not"):
        make_plan(open_checkpoint(str(tmp_path)), anatomy, anatomy.choose("mlp_out"), push)
    # The site beside it has nothing to do with it.
    assert make_plan(open_checkpoint(str(tmp_path)), anatomy, anatomy.choose("attn_out"), push)
