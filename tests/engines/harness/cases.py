"""Cases: small random bases of many families, in either spelling of rotary positions, and their bakes.

Every bake is what bake's own writer makes of the base on disk. A case keeps what transformers computes for
both, so that an engine's runner needs numpy and the engine, and nothing of bake.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bake.anatomy import examine
from bake.anatomy.routes import SiteRoute
from bake.anatomy.twin import build_random
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.writer import write_config, write_weights
from bake.engines.survival import find_rotation
from bake.models.forward import read_config
from bake.plan.plan import make_plan
from bake.strength.coefficients import LayerPush, Push

# The next token after each beginning of this text is asked for.
IDS = [1, 72, 104, 111, 35, 119, 100, 90]
WIDTH, LAYERS = 64, 4
COMMON = {
    "vocab_size": 304,
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {
    **{"vocab_size": 304, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 128},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
HEAD = {"head_dim": 32}
SCALED = {**HEAD, "query_pre_attn_scalar": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SHARED = {
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 64, "first_k_dense_replace": 1, "norm_topk_prob": True},
}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
# A window is as wide as the context, or none: an engine without windows computes the same then.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "arcee": {**HEAD},
    "bloom": {**GPT, "hidden_size": WIDTH},
    "cohere": {},
    "cohere2": {**HEAD, "sliding_window": 128},
    "codegen": {**GPT, "n_head": 4, "n_inner": 256, "rotary_dim": 8},
    "cwm": {
        **HEAD,
        "sliding_window": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "dots1": {**SHARED, **HEAD, "sliding_window": None, "num_key_value_heads": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 1},
    "gemma": {**HEAD},
    "gemma2": {**SCALED, "sliding_window": 128},
    "gemma3_text": {**SCALED, "sliding_window": 128, "num_hidden_layers": 7},
    "gemma4_text": {**HEAD, "global_head_dim": 64, "sliding_window": 128}
    | {"hidden_size_per_layer_input": 0, "num_hidden_layers": 6},
    "glm": {**HEAD},
    "glm4": {**HEAD},
    "glm4_moe": {**SHARED, **HEAD, "use_qk_norm": True},
    "gpt2": GPT,
    "gpt_bigcode": {**GPT, "n_inner": 256},
    "gpt_neo": {**{"vocab_size": 304, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 2}}
    | {"attention_types": [[["global", "local"], 2]], "intermediate_size": 256, "window_size": 128}
    | {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "gpt_neox": {**COMMON, "intermediate_size": 256},
    "gpt_oss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
    "gptj": {**GPT, "n_inner": 256, "rotary_dim": 16},
    "granite": {"residual_multiplier": 0.5},
    "helium": {**HEAD},
    "hunyuan_v1_dense": {**HEAD},
    "llama": {**THETA},
    "mistral": {"sliding_window": None, **THETA},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "nemotron": {**HEAD},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 128},
    "opt": {**COMMON, "ffn_dim": 160, "word_embed_proj_dim": WIDTH},
    "persimmon": {"num_key_value_heads": 2},
    "phi": {"num_key_value_heads": 2, "intermediate_size": 256},
    "phi3": {"sliding_window": None},
    "qwen2": {**THETA},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3": {**HEAD, **THETA},
    "qwen3_moe": {**HEAD, **EXPERTS, "norm_topk_prob": True},
    "seed_oss": {**HEAD},
    "smollm3": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
    "youtu": {"num_key_value_heads": 2, "kv_lora_rank": 64, "q_lora_rank": 64}
    | {"qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
}


@dataclass(frozen=True)
class Case:
    """One bake. base: the folder of its base. host: what it was re-expressed as, or "".

    spelling: of rotary positions in config.json, `rope_theta` as published, `rope_parameters` as
    transformers 5 saves it, "" where the family has none. outline: what an engine sees of it.
    """

    name: str
    family: str
    site: str
    kind: str
    host: str
    spelling: str
    base: str
    outline: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def write_cases(
    directory: Path, families: Mapping[str, dict[str, Any]] = FAMILIES, more: Mapping[str, Any] = {}
) -> None:
    """Write every case below a directory, anew: bases, bakes, `cases.json`. more: keys of every family."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cases: list[Case] = []
    for family, special in families.items():
        plain = {} if {"n_layer", "num_layers"} & set(special) else COMMON
        config = CONFIG_MAPPING[family](**{**plain, **special, **more})
        model = build_random(config, 0)
        spellings = ("rope_parameters", "rope_theta") if _is_spelled(config) else ("",)
        for spelling in spellings:
            base = directory / "-".join(filter(None, (family, spelling, "base")))
            save_base(model, base, published=spelling != "rope_parameters")
            np.save(base / "reference.npy", compute(base))
            cases += _write_bakes(base, family, spelling, directory)
    text = json.dumps([case.to_dict() for case in cases], indent=1, default=str)
    (directory / "cases.json").write_text(text + "\n", encoding="utf-8")


def _is_spelled(config: Any) -> bool:
    """Tell whether a config has rotary positions that transformers 4 spelled otherwise."""
    rope = getattr(config, "rope_parameters", None)
    return isinstance(rope, dict) and "rope_theta" in rope


def _write_bakes(base: Path, family: str, spelling: str, directory: Path) -> Iterator[Case]:
    checkpoint = open_checkpoint(str(base))
    anatomy = examine(read_config(base))
    for route in anatomy.routes:
        if route.route == "insert":
            continue
        host = route.rewriter.name if route.rewriter is not None else ""
        parts = (family, spelling, route.site, host or route.kind)
        target = directory / "-".join(filter(None, parts))
        target.mkdir()
        plan = make_plan(checkpoint, anatomy, route, make_push(route))
        write_weights(checkpoint, plan.edits, target)
        write_config(checkpoint, plan.config_changes, target)
        np.save(target / "reference.npy", compute(target))
        outline = route.outline(family, find_rotation(checkpoint.config))
        yield Case(
            target.name,
            family,
            route.site,
            route.kind,
            host,
            spelling,
            base.name,
            asdict(outline) if outline is not None else {},
        )


def make_push(route: SiteRoute) -> Push:
    """Return a push in every layer that a route covers, each of its own direction."""
    generator = torch.Generator().manual_seed(7)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
        for layer in route.layers
    }
    layers = tuple(LayerPush(layer, 1.0, 4.0) for layer in route.layers)
    band = (route.layers[0], route.layers[-1] + 1)
    return Push("explicit", 1.0, band, WIDTH, layers, directions)


def compute(directory: Path) -> np.ndarray:
    """Return log p(next token) after each beginning of IDS, (beginnings, vocabulary) float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS[:-1]])).logits[0]
    return logits.double().log_softmax(-1).numpy()


def save_base(model: Any, directory: Path, *, published: bool) -> None:
    """Save a model; `published`: as the Hub has its architecture, in transformers 4's spelling."""
    model.save_pretrained(directory)
    if not published:
        return
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = {}
    if config["model_type"] != "gemma4_text":  # Which was never spelled otherwise.
        rope = config.pop("rope_parameters", None) or {}
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaled = rope.get("rope_type", "default") != "default"
    config |= {key: value for key, value in rope.items() if key in _PLAIN}
    if scaled:
        config["rope_scaling"] = {k: v for k, v in rope.items() if k not in _PLAIN}
    if config["model_type"] == "gpt_neox":
        config["rotary_emb_base"] = rope["rope_theta"]
        config["rotary_pct"] = rope["partial_rotary_factor"]
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config["num_local_experts"]
    if config["model_type"] == "cohere2":
        config |= {"sliding_window_pattern": 4, "rotary_pct": 1.0}
    if config["model_type"] == "glm4_moe":
        config["rope_scaling"] = None
    if config["model_type"] == "gemma4_text":
        widths = {keys["head_dim"] for keys in config.pop("per_layer_config").values()}
        config["global_head_dim"] = max(widths)
    if config["model_type"] == "gpt2":
        from safetensors.torch import load_file, save_file

        config["n_ctx"] = config["n_positions"]
        weights = load_file(directory / "model.safetensors")
        plain = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


_PLAIN = ("rope_theta", "partial_rotary_factor")
