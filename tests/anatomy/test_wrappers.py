"""Multimodal wrappers: the text decoder inside is steered, the rest keeps its bytes.

Both layouts of names: as save_pretrained writes them today, and as the Hub has them from long ago.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTS, byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from bake.anatomy import examine
from bake.anatomy.wrappers import fit_sections
from bake.api import export, verify
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.loading import auto_class
from bake.checkpoint.writer import write_config, write_weights
from bake.hooks import steered
from bake.models.forward import compute_logits, load_model, read_config
from bake.models.streaming import Placement
from bake.plan.plan import make_plan
from bake.strength.coefficients import LayerPush, Push
from bake.texts.prompts import encode, load_tokenizer, make_batches

TEXT = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_id": 258,
    },
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "model_type": "qwen3_vl_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**VISION, "model_type": "pixtral"},
    },
}
WRAPPERS["qwen2_5_vl"] = {
    "text_config": {**WRAPPERS["qwen3_vl"]["text_config"], "model_type": "qwen2_5_vl_text"},
    "vision_config": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    },
}
WRAPPERS["llama4"] = {
    "text_config": {
        **TEXT,
        "num_local_experts": 4,
        "intermediate_size_mlp": 88,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    },
    "vision_config": {
        **VISION,
        "hidden_size": 32,
        "intermediate_size": 64,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "vision_output_dim": 32,
    },
}
WRAPPERS["mistral3-window"] = {
    **WRAPPERS["mistral3"],
    "text_config": {**TEXT, "model_type": "mistral", "sliding_window": 8},
}
AS_LLAMA = {"text_config.model_type": "llama", "text_config.mlp_bias": True}
# What `auto` chooses, and the keys that the bake sets.
CHOSEN = {
    "llava": ("mlp_out", {"text_config.mlp_bias": True}),
    "gemma3": ("attn_in", {"text_config.attention_bias": True}),
    "qwen3_vl": ("attn_out", {"text_config.attention_bias": True}),
    "qwen2_5_vl": ("attn_in", {}),
    "llama4": ("attn_out", {"text_config.attention_bias": True}),
    "mistral3": ("mlp_out", AS_LLAMA),
    "mistral3-window": ("mlp_out", {"text_config.model_type": "smollm3"}),
}
# A layout of names: "saved", as save_pretrained writes them (for llava and its kin the Hub's of long
# ago, `language_model.model.layers`); "module", as the modules are called; "old", Qwen2-VL's first.
# One goes through the whole pipeline, plain process included; the others are planned and written.
EXPORTED = [("llava", "saved")]
WRITTEN = [
    ("llava", "module"),
    ("gemma3", "saved"),
    ("gemma3", "module"),
    ("qwen3_vl", "saved"),
    ("qwen2_5_vl", "old"),
    ("llama4", "saved"),
    ("mistral3", "saved"),
    ("mistral3", "module"),
    ("mistral3-window", "saved"),
]
BESIDE = {
    ("llava", "saved"): "language_model.model.layers.2.mlp.down_proj.bias",
    ("llava", "module"): "model.language_model.layers.2.mlp.down_proj.bias",
    ("gemma3", "saved"): "language_model.model.layers.2.self_attn.q_proj.bias",
    ("gemma3", "module"): "model.language_model.layers.2.self_attn.q_proj.bias",
    ("qwen3_vl", "saved"): "model.language_model.layers.2.self_attn.o_proj.bias",
    ("qwen2_5_vl", "old"): "model.layers.2.self_attn.q_proj.bias",
    ("llama4", "saved"): "language_model.model.layers.2.self_attn.o_proj.bias",
    ("mistral3", "saved"): "language_model.model.layers.2.mlp.down_proj.bias",
    ("mistral3", "module"): "model.language_model.layers.2.mlp.down_proj.bias",
    ("mistral3-window", "saved"): "language_model.model.layers.2.mlp.down_proj.bias",
}


def build_wrapper(directory: Path, model_type: str, layout: str) -> None:
    config = AutoConfig.for_model(model_type.partition("-")[0], **WRAPPERS[model_type])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    model.save_pretrained(directory)
    if layout != "saved":
        tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        if layout == "old":
            tensors = {
                name.replace("model.language_model.", "model.").replace(
                    "model.visual.", "visual."
                ): t
                for name, t in tensors.items()
            }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"size": {"height": 28, "width": 28}}')


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """Return a function: (model type, layout) → a checkpoint with a tokenizer and a processor's file."""
    built: dict[tuple[str, str], Path] = {}

    def make(model_type: str, layout: str = "saved") -> Path:
        if (model_type, layout) not in built:
            directory = tmp_path_factory.mktemp(f"{model_type}-{layout}")
            build_wrapper(directory, model_type, layout)
            built[model_type, layout] = directory
        return built[model_type, layout]

    return make


@pytest.fixture(scope="module", params=EXPORTED, ids="-".join)
def baked(request, wrapper, pairs_file, prompts_file, tmp_path_factory):
    """A wrapper, its layout, its base and an export of it."""
    model_type, layout = request.param
    base = wrapper(model_type, layout)
    output = tmp_path_factory.mktemp("out") / "baked"
    result = export(str(base), output=output, pairs=pairs_file, prompts=prompts_file, band="50:75")
    return model_type, layout, base, output, result


def test_the_text_decoder_is_steered_and_the_rest_keeps_its_bytes(baked):
    model_type, layout, base, output, result = baked
    site, flags = CHOSEN[model_type]
    assert (result.plan.route.site, dict(result.plan.config_changes)) == (site, flags)
    assert result.equivalence.passed
    assert result.equivalence.mechanism_error <= 1e-4
    assert result.equivalence.plain_effect > 0.5
    assert not any(result.equivalence.loading_info.values())
    before, after = _tensors(base), _tensors(output)
    pushed = {edit.name for edit in result.plan.slot_edits}
    assert BESIDE[model_type, layout] in pushed & after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name not in pushed), name
    assert (output / "preprocessor_config.json").read_bytes() == (
        base / "preprocessor_config.json"
    ).read_bytes()


def test_the_nested_config_changes_in_its_flag_only(baked):
    model_type, _, base, output, _ = baked
    before, after = (json.loads((d / "config.json").read_text()) for d in (base, output))
    for path, value in CHOSEN[model_type][1].items():
        outer, inner = path.split(".")
        assert after[outer][inner] is value
        before[outer][inner] = value
    assert after == before


def test_the_card_says_how_it_is_loaded(baked):
    output = baked[3]
    card = (output / "README.md").read_text()
    assert "from transformers import AutoModelForImageTextToText, AutoTokenizer" in card
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForCausalLM" not in card


def test_an_exported_wrapper_is_verified(baked):
    _, _, base, output, _ = baked
    assert verify(output, base=str(base)).equivalence.passed


@pytest.mark.parametrize(("model_type", "layout"), WRITTEN)
def test_other_layouts_are_planned_written_and_loaded(wrapper, tmp_path, model_type, layout):
    base = wrapper(model_type, layout)
    checkpoint, anatomy = open_checkpoint(str(base)), examine(read_config(base))
    site, flags = CHOSEN[model_type]
    vector = torch.nn.functional.normalize(torch.ones(32), dim=0)
    push = Push("explicit", 1.0, (2, 3), 32, (LayerPush(2, 1.0, 3.0),), {2: vector})
    plan = make_plan(checkpoint, anatomy, anatomy.choose("auto"), push, dtype="float32")
    assert plan.route.site == site
    assert dict(plan.config_changes).items() >= flags.items()
    assert BESIDE[model_type, layout] in {edit.name for edit in plan.slot_edits}
    write_weights(checkpoint, plan.edits, tmp_path)
    write_config(checkpoint, plan.config_changes, tmp_path)
    batches = make_batches(encode(load_tokenizer(base), PROMPTS))
    loaded, baked = load_model(base), load_model(tmp_path)
    alone = torch.cat(compute_logits(loaded, batches))
    with steered(loaded.model, anatomy.structure, site, push.vectors):
        hooked = torch.cat(compute_logits(loaded, batches))
    effect = (hooked - alone).abs().max()
    assert effect > 0.01
    assert not any(baked.report.values())
    error = (torch.cat(compute_logits(baked, batches)) - hooked).abs().max()
    assert error < 1e-4 * effect


def test_an_image_is_seen_as_the_hooked_model_sees_it(baked):
    """The push is added to the places of an image as to those of a text."""
    _, _, base, output, result = baked
    loaded, steered_model = load_model(base).model, load_model(output).model
    image = loaded.config.image_token_id
    ids = torch.tensor([[5, 7, *[image] * 4, 9, 11, 13]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    plan = result.plan.route

    def look(model, pixels) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pixels).logits

    alone = look(loaded, pixels)
    assert (look(loaded, -pixels) - alone).abs().max() > 1e-3  # It looks at the image.
    structure = examine(read_config(base)).structure
    with steered(loaded, structure, plan.site, result.push.vectors):
        hooked = look(loaded, pixels)
    effect = (hooked - alone).abs().max()
    assert effect > 0.01
    error = (look(steered_model, pixels) - hooked).abs().max()
    assert error < result.equivalence.tolerance * effect


def test_a_layer_is_inserted_into_a_wrapper(wrapper, tmp_path):
    base = wrapper("mistral3")
    checkpoint, anatomy = open_checkpoint(str(base)), examine(read_config(base))
    vector = torch.nn.functional.normalize(torch.ones(32), dim=0)
    push = Push("explicit", 1.0, (2, 3), 32, (LayerPush(2, 1.0, 3.0),), {2: vector})
    route = anatomy.choose("auto", route="insert")
    plan = make_plan(checkpoint, anatomy, route, push, dtype="float32")
    assert plan.config_changes["text_config.num_hidden_layers"] == 5
    write_weights(checkpoint, plan.edits, tmp_path)
    write_config(checkpoint, plan.config_changes, tmp_path)
    batches = make_batches(encode(load_tokenizer(base), PROMPTS))
    loaded, baked = load_model(base), load_model(tmp_path)
    alone = torch.cat(compute_logits(loaded, batches))
    with steered(loaded.model, anatomy.structure, "mlp_out", push.vectors):
        hooked = torch.cat(compute_logits(loaded, batches))
    effect = (hooked - alone).abs().max()
    assert effect > 0.01
    assert not any(baked.report.values())
    assert (torch.cat(compute_logits(baked, batches)) - hooked).abs().max() < 1e-4 * effect


def test_a_wrapper_is_streamed(wrapper):
    base = wrapper("llava", "saved")
    whole = load_model(base)
    streamed = load_model(base, placement=Placement({"cpu": 1_000}))
    batches = make_batches(encode(load_tokenizer(base), PROMPTS))
    assert streamed.report == whole.report
    assert any(parameter.device.type == "meta" for parameter in streamed.model.parameters())
    for left, right in zip(
        compute_logits(streamed, batches), compute_logits(whole, batches), strict=True
    ):
        assert torch.equal(left, right)


def test_a_wrapper_keeps_its_own_type_when_its_decoder_becomes_another(wrapper):
    anatomy = examine(read_config(wrapper("mistral3")))
    assert anatomy.structure.layers == "model.language_model.layers"
    assert anatomy.architecture == "Mistral3ForConditionalGeneration"
    (route,) = anatomy.routes
    assert "text decoder re-expressed as llama" in route.describe()
    # An engine is asked for the wrapper, of which nothing is known; not for a Llama.
    assert {found.engine: found.verdict for found in anatomy.survivals(route)}["vllm"] == "unknown"
    assert all(name.startswith("model.language_model.layers.") for name in route.new_parameters)


def test_a_wrapper_of_real_size_has_a_twin():
    """Qwen2.5-VL 7B: the tower is large, and the rotary sections are made for a head of 128."""
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = {"hidden_size": 3584, "num_attention_heads": 28, "num_hidden_layers": 28}
    config = AutoConfig.for_model("qwen2_5_vl", text_config={**sizes, "rope_parameters": rotary})
    anatomy = examine(config)
    assert (anatomy.layer_count, anatomy.hidden_size) == (28, 3584)
    assert [route.site for route in anatomy.routes if route.route == "native"] == ["attn_in"]
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_a_wrapper_whose_text_has_a_class_of_its_own_is_examined_whole():
    config = AutoConfig.for_model("llama4")
    config.architectures = ["Llama4ForConditionalGeneration"]
    anatomy = examine(config)
    assert anatomy.architecture == "Llama4ForConditionalGeneration"
    assert {"attn_out", "attn_in"} <= {route.site for route in anatomy.routes}


def test_rotary_sections_are_fitted_in_proportion():
    assert fit_sections([16, 24, 24], 4) == [2, 1, 1]
    assert fit_sections([24, 20, 20], 4) == [2, 1, 1]
    assert fit_sections([16, 24, 24], 64) == [16, 24, 24]


def test_the_class_is_the_one_that_the_config_names():
    def chosen(model_type: str, *named: str) -> str:
        config = AutoConfig.for_model(model_type)
        config.architectures = list(named) or None
        return auto_class(config).__name__

    # Gemma 3's wrapper is in both of transformers' lists; Llama 4 has a class for its text alone.
    assert chosen("gemma3", "Gemma3ForConditionalGeneration") == "AutoModelForImageTextToText"
    assert chosen("llama4", "Llama4ForConditionalGeneration") == "AutoModelForImageTextToText"
    assert chosen("llama4", "Llama4ForCausalLM") == "AutoModelForCausalLM"
    assert chosen("gemma3_text", "Gemma3ForCausalLM") == "AutoModelForCausalLM"
    assert chosen("llava") == "AutoModelForImageTextToText"
    assert chosen("llama") == "AutoModelForCausalLM"


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }
