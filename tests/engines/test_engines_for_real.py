"""Bakes loaded in MLX for real: `pytest -m engines`, with the extra `engines`. Never skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bake.anatomy import examine
from bake.anatomy.flags import with_flags
from bake.anatomy.twin import build_random, fold
from bake.api import export
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.writer import write_config, write_weights
from bake.engines.survival import read_facts, survival
from bake.models.forward import read_config

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

IDS = [[1, 72, 104, 111, 35, 119, 100], [1, 90, 35, 3, 47, 200, 11]]


@pytest.fixture(scope="session")
def load_in_mlx():
    """Return a function directory → logits (batch, positions, vocabulary) as MLX computes them."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        pytest.fail(f"MLX is not installed ({error}): pip install 'bake-steering[engines]'")

    def load(directory: Path) -> np.ndarray:
        model, _ = load_model(directory)
        return np.array(model(mx.array(IDS)).astype(mx.float32))

    return load


@pytest.fixture
def bake(tmp_path, prompts_file):
    """Return a function (base, site) → the directory of its bake."""

    def make(base: Path, site: str) -> Path:
        direction = tmp_path / "direction.safetensors"
        vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))
        save_file({"direction": vector}, direction, metadata={"site": site})
        output = tmp_path / "baked"
        export(
            str(base),
            output=output,
            direction=direction,
            site=site,
            multiplier=4.0,
            prompts=prompts_file,
        )
        return output

    return make


def transformers_logits(directory: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(
    ("architecture", "site"),
    [
        ("llama", "mlp_out"),
        ("llama", "attn_out"),
        ("llama", "attn_in"),
        ("llama", "mlp_in"),
    ],
)
def test_mlx_computes_what_transformers_computes(architecture, site, make_model, bake, load_in_mlx):
    base = make_model(architecture=architecture)
    baked = bake(base, site)
    expected = transformers_logits(baked)
    found = load_in_mlx(baked)
    effect = np.abs(load_in_mlx(base) - found).max()
    assert effect > 0.1, "the bake has to be seen before equality says anything"
    assert np.abs(found - expected).max() < 1e-3 * effect


def test_mlx_refuses_the_biases_that_its_qwen3_has_no_slot_for(make_model, bake, load_in_mlx):
    base = make_model(architecture="qwen3")
    assert np.abs(load_in_mlx(base) - transformers_logits(base)).max() < 1e-3
    baked = bake(base, "attn_out")
    with pytest.raises(ValueError, match=r"(?s)not in model.*self_attn.o_proj.bias"):
        load_in_mlx(baked)
    slot = "model.layers.0.self_attn.o_proj.bias"
    assert survival("mlx", "qwen3", [slot]).verdict == "error"


# Small configurations, one for each architecture of which facts.toml says `run` for MLX. Widths unlike
# each other; what is special to one stands in its line.
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": COMMON,
    "cohere2": COMMON,
    "gemma": {**COMMON, "head_dim": 8},
    "gemma2": {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**COMMON, "head_dim": 8, "num_hidden_layers": 7},
    "glm4": {**COMMON, "head_dim": 8},
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "n_inner": 128},
    "gpt_neox": {**COMMON, "intermediate_size": 128},
    "gptj": {**GPT, "n_inner": 128, "rotary_dim": 4},
    "granite": {**COMMON, "residual_multiplier": 0.5},
    "helium": {**COMMON, "head_dim": 8},
    "hunyuan_v1_dense": {**COMMON, "head_dim": 8},
    "llama": COMMON,
    "nemotron": COMMON,
    "olmo": COMMON,
    "olmo2": COMMON,
    "olmo3": COMMON,
    "phi": {**COMMON, "num_key_value_heads": 4},
    "qwen2": COMMON,
    "qwen2_moe": {**COMMON, "num_experts": 4, "moe_intermediate_size": 24},
    "qwen3": {**COMMON, "head_dim": 8},
    "qwen3_moe": {**COMMON, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    "seed_oss": {**COMMON, "head_dim": 8},
    "smollm3": COMMON,
    "stablelm": {**COMMON, "partial_rotary_factor": 0.5},
    "starcoder2": {**COMMON, "sliding_window": None},
}
# Here one of the two takes the exact GELU and the other its tanh form, which moves the base by as much.
COARSE = {"gpt_bigcode", "gpt_neox", "starcoder2"}


def write_as_published(model: Any, directory: Path) -> None:
    """Save a model as the published checkpoints of its architecture are: transformers 4's spelling."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    config |= {key: value for key, value in rope.items() if key != "rope_type"}
    if config["model_type"] == "gpt_neox":
        config |= {
            "rotary_emb_base": rope["rope_theta"],
            "rotary_pct": rope["partial_rotary_factor"],
        }
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config["num_local_experts"]
    if config["model_type"] == "cohere2":
        config["sliding_window_pattern"] = 4
    if config["model_type"] == "gpt2":
        config["n_ctx"] = config["n_positions"]
        weights = load_file(directory / "model.safetensors")
        plain = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config))


def test_every_fact_that_is_said_to_be_run_is_run():
    reads = read_facts()["mlx"]["reads"]
    assert {name for name, family in reads.items() if "checked" not in family} == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mlx_does_with_every_route_what_the_facts_say(model_type, tmp_path, load_in_mlx):
    config = CONFIG_MAPPING[model_type](**FAMILIES[model_type])
    routes = [route for route in examine(config).routes if route.rewriter is None]
    assert routes
    for number, route in enumerate(routes):
        torch.manual_seed(number)
        model = build_random(with_flags(config, route.flags), number)
        write_as_published(model, tmp_path / f"{number}-base")
        push = {layer: torch.randn(HIDDEN) * 0.5 for layer in route.layers}
        fold(model, route.slots, push)
        write_as_published(model, tmp_path / f"{number}-baked")
        slots = [slot.bias for layer in route.layers for slot in route.slots_of(layer)]
        if survival("mlx", model_type, slots, route.new_parameters).verdict == "error":
            with pytest.raises((ValueError, SystemExit)):
                load_in_mlx(tmp_path / f"{number}-baked")
            continue
        logits = load_in_mlx(tmp_path / f"{number}-baked")
        effect = np.abs(load_in_mlx(tmp_path / f"{number}-base") - logits).max()
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(IDS)).logits.numpy()
        assert effect > 0.01
        bound = 3e-3 if model_type in COARSE else 1e-3
        assert np.abs(logits - expected).max() < bound * effect, route.site


HOSTED = {
    "qwen2": {**COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral": {
        **COMMON,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}


@pytest.mark.parametrize("published", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("model_type", HOSTED)
def test_a_host_keeps_rotary_positions_in_either_spelling(
    model_type, published, tmp_path, load_in_mlx
):
    """MLX knows `rope_theta` alone: a host that has only `rope_parameters` is another model there."""
    base = tmp_path / "base"
    model = build_random(CONFIG_MAPPING[model_type](**HOSTED[model_type]), 0)
    (write_as_published if published else type(model).save_pretrained)(model, base)
    anatomy = examine(CONFIG_MAPPING[model_type](**HOSTED[model_type]))
    route = anatomy.choose("mlp_out")
    assert route.rewriter.name == "llama"
    opened = open_checkpoint(str(base))
    rewritten = route.rewriter.rewrite(opened, read_config(base), list(route.layers))
    output = tmp_path / "hosted"
    output.mkdir()
    write_weights(opened, rewritten.edits, output)
    write_config(opened, rewritten.config_changes, output)
    expected = transformers_logits(output)
    assert np.abs(expected - transformers_logits(base)).max() < 1e-4
    assert np.abs(load_in_mlx(output) - expected).max() < 1e-3 * np.abs(expected).max()
