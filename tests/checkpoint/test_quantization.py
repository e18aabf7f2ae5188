"""Quantised bases: their bytes stay, the push lies beside them, and transformers reads both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from bake.anatomy import examine
from bake.anatomy.base import open_base
from bake.api import export
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.writer import write_config, write_weights
from bake.errors import UnsupportedError
from bake.hooks import steered
from bake.models.forward import compute_logits, load_model, read_config
from bake.models.streaming import Placement
from bake.plan.plan import make_plan
from bake.strength.coefficients import LayerPush, Push
from bake.texts.prompts import encode, load_tokenizer, make_batches

BLOCK = 16
UNTOUCHED = "model.layers.2.mlp.down_proj"  # one module that the fp8 bases leave as it is
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
    },
}


def quantize_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Store every projection as float8 in blocks, with a scale for each, as DeepSeek-V3 is stored."""
    found = {}
    for name, weight in tensors.items():
        if not name.endswith(("proj.weight", "mqa.weight")) or name.startswith(UNTOUCHED):
            found[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / 448
        numbers = (blocks / scale[:, None, :, None]).reshape(rows, columns)
        found[name] = numbers.to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found


def quantize_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the experts' matrices by random four-bit numbers and scales, as GPT-OSS is stored."""
    found = {}
    generator = torch.Generator().manual_seed(4)
    for name, weight in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = weight
            continue
        experts, inner, rows = weight.shape
        shape = (experts, rows, inner // 32)
        found[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        found[f"{name}_scales"] = torch.randint(
            119, 124, shape, generator=generator, dtype=torch.uint8
        )
    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Return a function: model type → a quantised checkpoint with bfloat16 for the rest."""
    built: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type in built:
            return built[model_type]
        directory = tmp_path_factory.mktemp(model_type)
        config = AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type]})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.2 if parameter.ndim > 1 else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
        model.save_pretrained(directory)
        stored = load_file(directory / "model.safetensors")
        values = json.loads((directory / "config.json").read_text())
        if model_type == "gpt_oss":
            stored = quantize_mxfp4(stored)
            values["quantization_config"] = {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            }
        else:
            stored = quantize_fp8(stored)
            values["quantization_config"] = {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
                "modules_to_not_convert": [UNTOUCHED, "lm_head"],
            }
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(values, indent=2))
        byte_tokenizer().save_pretrained(directory)
        built[model_type] = directory
        return directory

    return make


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def push_on(*layers: int) -> Push:
    vector = torch.nn.functional.normalize(
        torch.randn(64, generator=torch.Generator().manual_seed(5)), dim=0
    )
    entries = tuple(LayerPush(layer, 1.0, 4.0) for layer in layers)
    return Push(
        "explicit", 1.0, (layers[0], layers[-1] + 1), 64, entries, dict.fromkeys(layers, vector)
    )


@pytest.mark.parametrize("model_type", MODELS)
def test_weights_are_dequantised_as_transformers_does(quantized, model_type):
    directory = quantized(model_type)
    names = DiskNames(open_checkpoint(str(directory)), build_on_meta(read_config(directory)))
    model = load_model(directory).model
    assert names.fusions
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(names.read(name).float(), parameter), name
    # Norms go through the same pattern as quantised weights and are none.
    assert names.find("model.norm.weight") == "model.norm.weight"


@pytest.mark.parametrize(
    ("model_type", "site"),
    [("llama", "mlp_out"), ("gpt_oss", "attn_out"), ("deepseek_v3", "attn_out")],
)
def test_an_export_keeps_the_quantised_bytes(
    quantized, pairs_file, prompts_file, tmp_path, model_type, site
):
    base = quantized(model_type)
    result = export(
        str(base), output=tmp_path / "out", pairs=pairs_file, prompts=prompts_file, site=site, band="50:75"
    )  # fmt: skip
    assert result.equivalence.passed
    assert result.equivalence.mechanism_error <= 1e-4
    assert result.equivalence.plain_effect > 0.5
    assert any("ran it dequantised too" in warning for warning in result.equivalence.warnings)
    assert result.equivalence.stored_dtype == "bfloat16"
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    pushed = {edit.name for edit in result.plan.slot_edits}
    assert {after[name].dtype for name in pushed} == {torch.bfloat16}
    for name, tensor in before.items():
        same = torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
        assert same == (name not in pushed), name
    configs = [json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def bake_into(directory: Path, base: Path, site: str) -> Path:
    checkpoint, anatomy = open_checkpoint(str(base)), examine(read_config(base))
    plan = make_plan(checkpoint, anatomy, anatomy.choose(site), push_on(1, 2))
    write_weights(checkpoint, plan.edits, directory)
    write_config(checkpoint, plan.config_changes, directory)
    return directory


def test_a_projection_is_folded_through_the_dequantised_matrix(quantized, tmp_path):
    base = quantized("llama")
    anatomy = examine(read_config(base))
    batches = make_batches(encode(load_tokenizer(base), PROMPTS))
    loaded = load_model(base)
    alone = torch.cat(compute_logits(loaded, batches))
    with steered(loaded.model, anatomy.structure, "attn_in", push_on(1, 2).vectors):
        hooked = torch.cat(compute_logits(loaded, batches))
    baked = load_model(bake_into(tmp_path, base, "attn_in"))
    assert not any(baked.report.values())
    effect = (hooked - alone).abs().max()
    assert effect > 0.1
    # bfloat16 biases: what is stored is rounded, and no more than that.
    assert (torch.cat(compute_logits(baked, batches)) - hooked).abs().max() < 5e-3 * effect


def test_the_quantised_layers_take_the_bias_too(quantized, tmp_path, monkeypatch):
    """On a GPU transformers keeps float8 and its own linear layer, which cannot run here but can load."""
    from transformers.integrations.finegrained_fp8 import FP8Linear
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    directory = bake_into(tmp_path, quantized("llama"), "mlp_out")
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, FP8Linear)
    assert isinstance(model.config.quantization_config, FineGrainedFP8Config)
    assert not isinstance(model.model.layers[2].mlp.down_proj, FP8Linear)  # It is left unquantised.
    expected = push_on(1).vectors[1].to(torch.bfloat16)
    assert torch.equal(layer.bias, expected)
    assert torch.equal(model.model.layers[2].mlp.down_proj.bias, expected)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_quantised_experts_are_streamed(quantized, model_type):
    directory = quantized(model_type)
    batches = make_batches(encode(load_tokenizer(directory), PROMPTS[:2]))
    whole = load_model(directory)
    streamed = load_model(directory, placement=Placement({"cpu": 1_000}))
    assert streamed.report == whole.report
    assert torch.equal(
        torch.cat(compute_logits(streamed, batches)), torch.cat(compute_logits(whole, batches))
    )


@pytest.mark.parametrize(
    ("values", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_other_quantisations_are_refused_by_name(make_model, tmp_path, values, method):
    source = make_model()
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": values}))
    shutil.copy(source / "model.safetensors", tmp_path)
    with pytest.raises(UnsupportedError, match=f"quantised by {method}.*bake the unquantised base"):
        open_base(str(tmp_path))


def test_a_quantised_base_is_not_stored_in_another_dtype(quantized):
    base = open_base(str(quantized("llama")))
    route = base.anatomy.choose("mlp_out")
    with pytest.raises(UnsupportedError, match=r"is quantised \(fp8\).*leave --dtype out"):
        make_plan(base.checkpoint, base.anatomy, route, push_on(1), dtype="float32")
