"""Hosts: a base as the Hub has it, re-expressed, reloaded by plain transformers, equals the hook."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from bake.anatomy import examine
from bake.anatomy.hosts import CONVERSIONS, find_hosts
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.edits import REMOVED
from bake.checkpoint.loading import load_report
from bake.checkpoint.writer import write_config, write_weights
from bake.cli import main as cli
from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.hooks import steered
from bake.lifecycle.verify import compare_tensors
from bake.models.forward import read_config
from bake.plan.plan import make_plan
from bake.strength.coefficients import LayerPush, Push
from bake.texts.tokenizer import TEXTS, keep_tokenizer

# Plain transformers says so of shared experts of width 0, and does what is meant.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

LAYERS, HIDDEN, BAND, STRENGTH = 4, 32, range(1, 3), 4.0
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 88,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 300, (2, 14), generator=torch.Generator().manual_seed(1))
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 2.3],
}


@dataclass(frozen=True)
class Case:
    """A base, the host that it should get, and the config keys that change besides the identity."""

    name: str
    base: str
    host: str
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    json: dict[str, Any] = field(default_factory=dict)  # keys of config.json in the Hub's spelling
    slot: str = "mlp.down_proj.bias"
    split: bool = False  # fused matrices are cut
    renames: dict[str, str] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)  # where the classes disagree
    computed: tuple[str, ...] = ()  # tensors whose bytes change, other than by cutting
    disk_slot: str = ""  # where the host's files have another name for the slot
    constants: bool = False  # what is new is more than zero biases
    reordered: bool = False  # the host sums in another order
    limited: bool = False  # taken on request only

    def __str__(self) -> str:
        return f"{self.name}-{self.host}"

    def rename(self, name: str) -> str:
        for old, new in self.renames.items():
            name = name.replace(old, new)
        return name

    def computes(self, name: str) -> bool:
        return any(part in name for part in self.computed)

    def __hash__(self) -> int:
        return hash(self.name)


BOTH = {"attention_bias": True, "mlp_bias": True}
MLP = {"mlp_bias": True}
QWEN2_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
PHI3_KEYS = frozenset({"resid_pdrop", "embd_pdrop", "sliding_window"})
WINDOW_KEYS = frozenset({"sliding_window", "layer_types"})
MIXTRAL_KEYS = frozenset(
    {"sliding_window", "num_local_experts", "num_experts_per_tok", "output_router_logits"}
    | {"router_aux_loss_coef", "router_jitter_noise"}
)
MIXED = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
ATTENTION_ONLY = {
    **MLP,
    "attn_layer_indices": list(range(LAYERS)),
    "mamba_n_heads": 1,
    "head_dim": 8,
}
LLAMA_4 = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
HY_EXPERTS = {
    **MLP,
    "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
    "num_experts": 4,
    "num_shared_experts": 2,
    "router_scaling_factor": 2.5,
    "enable_moe_fp32_combine": False,
    "head_dim": 8,
}
HY_REMOVED = frozenset(
    {"n_routed_experts", "n_shared_experts", "first_k_dense_replace", "norm_topk_prob"}
    | {"routed_scaling_factor", "n_group", "topk_group"}
)
HY_NAMES = {
    ".mlp.gate.weight": ".mlp.router.gate.weight",
    ".mlp.gate.e_score_correction_bias": ".mlp.expert_bias",
    ".mlp.shared_experts.": ".mlp.shared_mlp.",
}
GEMMA_4 = {"head_dim": 16, "global_head_dim": 32}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
# Half of a head of 8 dimensions rotates: two pairs, by θ^(−2i/4) where the host has θ^(−2i/8).
HALF = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 1.0,
    "attention_factor": 1.0,
    "short_factor": [1.0, 1e4**0.25, 1e20, 1e20],
    "long_factor": [1.0, 1e4**0.25, 1e20, 1e20],
    "original_max_position_embeddings": 64,
}
BAMBA_NAMES = {
    ".mlp.": ".feed_forward.",
    ".post_attention_layernorm.": ".pre_ff_layernorm.",
    "model.norm.": "model.final_layernorm.",
}


def sliding(types: list[str]) -> dict[str, Any]:
    return {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": types,
        "no_rope_layers": [1] * LAYERS,
    }


CASES = [
    Case("qwen2", "qwen2", "llama", {}, BOTH, QWEN2_KEYS),
    Case("qwen2-tied", "qwen2", "llama", {"tie_word_embeddings": True}, BOTH, QWEN2_KEYS),
    Case(
        "qwen2-yarn",
        "qwen2",
        "llama",
        {},
        BOTH,
        QWEN2_KEYS,
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    Case(
        "mistral", "mistral", "llama", {"sliding_window": None}, MLP, frozenset({"sliding_window"})
    ),
    Case(
        "phi3",
        "phi3",
        "llama",
        {},
        MLP,
        PHI3_KEYS | {"auto_map"},
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
        split=True,
    ),
    Case(
        "phi3-wide-window",
        "phi3",
        "llama",
        {"sliding_window": 64, "tie_word_embeddings": True},
        MLP,
        PHI3_KEYS,
        split=True,
    ),
    Case(
        "phi3-longrope",
        "phi3",
        "llama",
        {"max_position_embeddings": 64},
        MLP,
        PHI3_KEYS,
        {"rope_theta": 1e4, "rope_scaling": LONGROPE, "original_max_position_embeddings": 8},
        split=True,
    ),
    Case(
        "mistral-window",
        "mistral",
        "smollm3",
        {"sliding_window": 6, "head_dim": 16},
        {**MLP, **sliding(["sliding_attention"] * LAYERS), "head_dim": 16},
    ),
    Case(
        "ministral-mixed",
        "ministral",
        "smollm3",
        {"sliding_window": 6, "head_dim": 8, "layer_types": MIXED},
        {**MLP, **sliding(MIXED), "head_dim": 8},
    ),
    Case(
        "ministral", "ministral", "llama", {"sliding_window": 64, "head_dim": 8}, MLP, WINDOW_KEYS
    ),
    Case(
        "qwen2-window",
        "qwen2",
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
        {**BOTH, **sliding(MIXED), "head_dim": 8},
        frozenset({"max_window_layers"}),
    ),
    Case(
        "phi3-window",
        "phi3",
        "smollm3",
        {"sliding_window": 6},
        {**MLP, **sliding(["sliding_attention"] * LAYERS), "head_dim": 8},
        PHI3_KEYS - {"sliding_window"},
        split=True,
    ),
    Case(
        "phi3-partial",
        "phi3",
        "bamba",
        {},
        ATTENTION_ONLY,
        PHI3_KEYS,
        # As Phi-4-mini has it: Bamba's class would read a half.
        {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": None},
        "feed_forward.down_proj.bias",
        split=True,
        renames=BAMBA_NAMES,
        stated={"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ),
    Case(
        "glm",
        "glm",
        "bamba",
        {"head_dim": 8},
        ATTENTION_ONLY,
        slot="feed_forward.down_proj.bias",
        split=True,
        renames=BAMBA_NAMES,
        computed=("q_proj", "k_proj"),
    ),
    Case(
        "glm-whole",
        "glm",
        "llama",
        {"head_dim": 8},
        {**MLP, "rope_parameters": HALF, "head_dim": 8},
        split=True,
        computed=("q_proj", "k_proj"),
    ),
    Case(
        "ministral3",
        "ministral3",
        "llama",
        {"head_dim": 8, "rope_parameters": {**LLAMA_4, "llama_4_scaling_beta": 0.1}},
        {**MLP, "rope_parameters": LLAMA_4, "head_dim": 8},
        frozenset({"sliding_window"}),
        limited=True,
    ),
    Case(
        "youtu",
        "youtu",
        "deepseek_v2",
        {"num_key_value_heads": 4, **LATENT},
        {**MLP, "first_k_dense_replace": LAYERS},
        frozenset({"rope_interleave", "embedding_initializer_range"}),
        reordered=True,
    ),
    Case(
        "dots1",
        "dots1",
        "hy_v3",
        EXPERTS,
        HY_EXPERTS,
        HY_REMOVED | {"sliding_window", "max_window_layers", "layer_types"},
        slot="mlp.shared_experts.down_proj.bias",
        disk_slot="mlp.shared_mlp.down_proj.bias",
        renames=HY_NAMES,
    ),
    Case(
        "glm4-moe",
        "glm4_moe",
        "hy_v3",
        {**EXPERTS, "use_qk_norm": True, "head_dim": 8, "attention_bias": True},
        {**HY_EXPERTS, "rope_parameters": HALF},
        HY_REMOVED | {"use_qk_norm", "num_mtp_layers"},
        slot="mlp.shared_experts.down_proj.bias",
        disk_slot="mlp.shared_mlp.down_proj.bias",
        renames=HY_NAMES,
        computed=("q_proj", "k_proj", "q_norm", "k_norm"),
    ),
    Case(
        "gemma4",
        "gemma4_text",
        "gemma4_text",
        {**GEMMA_4, "hidden_size_per_layer_input": 0},
        PER_LAYER,
        slot="post_per_layer_input_norm.weight",
        constants=True,
    ),
    Case(
        "gemma4-experts",
        "gemma4_text",
        "gemma4_text",
        {
            **GEMMA_4,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
        PER_LAYER,
        slot="post_per_layer_input_norm.weight",
        constants=True,
    ),
    Case(
        "gemma4-unified",
        "gemma4_unified_text",
        "gemma4_text",
        GEMMA_4,
        PER_LAYER,
        slot="post_per_layer_input_norm.weight",
        constants=True,
    ),
    Case(
        "gemma",
        "gemma",
        "granite",
        {"head_dim": 16},
        {
            **MLP,
            "embedding_multiplier": HIDDEN**0.5,
            "attention_multiplier": 0.25,
            "head_dim": 16,
            "hidden_act": "gelu_pytorch_tanh",
        },
        frozenset({"use_bidirectional_attention"}),
        computed=("norm.weight",),
    ),
    Case(
        "qwen3",
        "qwen3",
        "hy_v3",
        {"head_dim": 16, "tie_word_embeddings": True},
        {**MLP, "mlp_layer_types": ["dense"] * LAYERS},
        QWEN2_KEYS,
    ),
    Case(
        "mixtral",
        "mixtral",
        "aria_text",
        {"num_local_experts": 3},
        {
            **MLP,
            "moe_num_experts": 3,
            "moe_topk": 2,
            "moe_num_shared_experts": 0,
            "head_dim": 8,
        },
        MIXTRAL_KEYS,
        slot="mlp.shared_experts.down_proj.bias",
        renames={".block_sparse_moe.gate.": ".mlp.router."},
        computed=("experts.",),
    ),
]


def build_base(directory: Path, case: Case, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random base in several shards; `case.json` goes into config.json in the Hub's spelling."""
    values = {k: v for k, v in case.json.items() if k != "auto_map"}
    config = AutoConfig.for_model(case.base, **{**SIZES, **values, **case.config})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    source = directory.with_name(directory.name + "-float32")
    model.save_pretrained(source)
    stored = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    stored.save_pretrained(directory, max_shard_size="50KB")
    if case.json:
        changes = {"rope_parameters": REMOVED} if "rope_scaling" in case.json else {}
        path = directory / "config.json"
        path.write_text(edit_json(path.read_text(), {**changes, **case.json}))
    return directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return cache(lambda case: build_base(root / case.name, case))


def make_push(strength: float) -> Push:
    generator = torch.Generator().manual_seed(5)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
        for layer in BAND
    }
    layers = tuple(LayerPush(layer, 1.0, strength) for layer in BAND)
    return Push("explicit", 1.0, (BAND.start, BAND.stop), HIDDEN, layers, directions)


def load(directory: Path):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(load_report(info).values())
    return model.eval()


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def continue_greedily(model) -> torch.Tensor:
    return model.generate(IDS[:1], max_new_tokens=10, min_new_tokens=10, do_sample=False)


def write_plan(directory: Path, checkpoint, plan) -> Path:
    directory.mkdir()
    write_weights(checkpoint, plan.edits, directory)
    write_config(checkpoint, plan.config_changes, directory)
    return directory


@pytest.fixture(scope="module", params=CASES, ids=str)
def setting(request, bases, tmp_path_factory):
    """A case, its base's checkpoint, anatomy and route; base and baked loaded by plain transformers."""
    case = request.param
    checkpoint = open_checkpoint(str(bases(case)))
    anatomy = examine(read_config(checkpoint.directory))
    route = anatomy.choose("mlp_out", host=case.host)
    plan = make_plan(checkpoint, anatomy, route, make_push(STRENGTH))
    directory = write_plan(tmp_path_factory.mktemp("baked") / case.name, checkpoint, plan)
    return case, checkpoint, anatomy, route, plan, directory


def test_baked_host_equals_hooked_base(setting):
    _, checkpoint, anatomy, route, _, directory = setting
    model = load(checkpoint.directory)
    base, base_tokens = run(model), continue_greedily(model)
    with steered(model, anatomy.structure, route.site, make_push(STRENGTH).vectors):
        hooked, hooked_tokens = run(model), continue_greedily(model)
    effect = (hooked - base).abs().max()
    assert effect > 0.3 * base.std()
    assert not torch.equal(base_tokens, hooked_tokens)

    baked = load(directory)
    assert (run(baked) - hooked).abs().max() <= 1e-5 * effect
    assert torch.equal(continue_greedily(baked), hooked_tokens)


def test_host_without_a_push_is_the_base(setting, tmp_path):
    case, checkpoint, anatomy, route, *_ = setting
    plan = make_plan(checkpoint, anatomy, route, make_push(0.0))
    unpushed = load(write_plan(tmp_path / "unpushed", checkpoint, plan))
    base = load(checkpoint.directory)
    logits = run(base)
    # Fused matrices are multiplied apart, in another order of sums.
    inexact = case.split or case.computed or case.reordered
    tolerance = float(logits.abs().max()) * (5e-6 if inexact else 1e-7)
    torch.testing.assert_close(run(unpushed), logits, rtol=0, atol=tolerance)
    assert torch.equal(continue_greedily(unpushed), continue_greedily(base))


def test_route_names_the_host_and_is_proven(setting):
    case, _, anatomy, route, *_ = setting
    assert (route.site, route.route, route.rewriter.name) == ("mlp_out", "host", case.host)
    assert route.twin.passed
    assert route.twin.effect > 0.1
    assert route.flags == {"model_type": case.host, **case.changes}
    assert [slot.bias for slot in route.slots_of(2)] == [f"model.layers.2.{case.slot}"]
    assert route.to_dict()["rewritten_as"] == case.host
    assert route.on_request == case.limited
    if case.limited:
        return
    in_place = [entry.site for entry in anatomy.routes if entry.rewriter is None]
    expected = "attn_out" if "attn_out" in in_place and case.host != "llama" else "mlp_out"
    assert anatomy.choose("auto").site == expected


def test_config_is_the_bases_but_for_what_the_host_needs(setting):
    case, checkpoint, _, _, _, directory = setting
    after = json.loads((directory / "config.json").read_text())
    before = dict(checkpoint.config)
    architecture = type(load(directory)).__name__
    wanted = {"model_type": case.host, "architectures": [architecture]}
    wanted |= {**case.changes, **case.stated}
    # For other engines: every key that the host declares, and rotary positions as it was spelled before.
    plain_keys = {entry.name for entry in fields(PreTrainedConfig)}
    declared = {entry.name for entry in fields(type(read_config(directory)))} - plain_keys
    plain_rotation = "rope_theta" in after.get(
        "rope_parameters", {}
    )  # Gemma 4 has one a kind of layer
    spelled = {"rope_theta", "rope_scaling"} if plain_rotation else set()
    new = set(after) - set(before) - wanted.keys()
    assert new <= declared | spelled
    host = read_config(directory)
    values = host.to_dict()
    simple = {key for key in declared if isinstance(values.get(key), bool | int | float | str)}
    assert simple <= after.keys(), "an engine's default may be another"
    if spelled:
        assert after["rope_theta"] == after["rope_parameters"]["rope_theta"]
        plain = dict(after)
        del plain["rope_parameters"]
        (directory / "config.json").write_text(json.dumps(plain))
        older = read_config(directory).rope_parameters
        (directory / "config.json").write_text(json.dumps(after))
        assert older == read_config(directory).rope_parameters
    after = {key: value for key, value in after.items() if key not in new}
    expected = {key: value for key, value in wanted.items() if before.get(key) != value}
    assert {key: after[key] for key in after if after[key] != before.get(key)} == expected
    assert before.keys() - after.keys() == case.removed & before.keys()
    # What decides the computation and the end of a text reads the same in both classes.
    old, new = read_config(checkpoint.directory), read_config(directory)
    for key in ("rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(new, key, None) == getattr(old, key, None), key


def test_kept_tensors_keep_their_bytes(setting):
    case, checkpoint, _, _, plan, directory = setting
    baked = open_checkpoint(str(directory))
    kept = {name: case.rename(name) for name in checkpoint.tensors if not case.computes(name)}
    same = {old: new for old, new in kept.items() if new in baked.tensors}
    assert len(same) > 10
    assert all(baked.read_bytes(new) == checkpoint.read_bytes(old) for old, new in same.items())
    cut = {old: new for old, new in kept.items() if new not in same.values()}
    assert bool(cut) == case.split
    for old, new in cut.items():  # The pieces, one after the other, are the fused matrix's bytes.
        fused = {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}
        part = next(key for key in fused if key in old)
        pieces = [new.replace(part, f"{piece}_proj") for piece in fused[part]]
        assert b"".join(baked.read_bytes(piece) for piece in pieces) == checkpoint.read_bytes(old)
    changed = [name for name in checkpoint.tensors if case.computes(name)]
    assert bool(changed) == bool(case.computed)
    for name in changed:
        if case.rename(name) not in baked.tensors:
            continue  # Merged: see the test of Mixtral's experts.
        assert baked.read_bytes(case.rename(name)) != checkpoint.read_bytes(name)
    pushed = {edit.name for edit in plan.slot_edits}
    slot = case.disk_slot or case.slot
    assert pushed == {f"model.layers.{layer}.{slot}" for layer in BAND}
    if case.constants:
        assert all(baked.read(name).any() for name in pushed)
        return
    new = {name for name in baked.tensors if name.endswith(".bias")} - set(checkpoint.tensors)
    assert pushed < new
    assert all(not baked.read(name).any() for name in new - pushed)
    assert all(baked.read(name).any() for name in pushed)


def test_experts_are_merged_bit_for_bit(bases, tmp_path):
    case = next(case for case in CASES if case.name == "mixtral")
    checkpoint = open_checkpoint(str(bases(case)))
    anatomy = examine(read_config(checkpoint.directory))
    plan = make_plan(checkpoint, anatomy, anatomy.choose("mlp_out"), make_push(STRENGTH))
    directory = write_plan(tmp_path / "baked", checkpoint, plan)
    baked = open_checkpoint(str(directory))
    apart = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    spread = [
        {checkpoint.entry(apart.format(layer, e, w)).file for e in range(3) for w in ("w1", "w3")}
        for layer in range(LAYERS)
    ]
    assert any(len(files) > 1 for files in spread)  # What is merged comes from several shards.
    for layer in range(LAYERS):
        first = baked.read(f"model.layers.{layer}.mlp.experts.fc1.weight")
        second = baked.read(f"model.layers.{layer}.mlp.experts.fc2.weight")
        for expert in range(3):
            parts = [checkpoint.read(apart.format(layer, expert, f"w{n}")) for n in (1, 3)]
            assert torch.equal(first[expert], torch.cat(parts).T)
            assert torch.equal(second[expert], checkpoint.read(apart.format(layer, expert, "w2")).T)
    name = "model.layers.3.mlp.experts.fc2.weight"
    entry = baked.entry(name)
    with (directory / entry.file).open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\x01\x02\x03\x04")
    assert list(compare_tensors(checkpoint, open_checkpoint(str(directory)), plan)) == [
        f"tensor {name} is not the base's"
    ]


def test_verification_compares_renamed_and_split_tensors(setting, tmp_path):
    case, checkpoint, _, _, plan, directory = setting
    assert list(compare_tensors(checkpoint, open_checkpoint(str(directory)), plan)) == []
    name = case.rename("model.layers.3.mlp.gate_proj.weight" if case.split else "model.norm.weight")
    damaged = write_plan(tmp_path / "damaged", checkpoint, plan)
    entry = open_checkpoint(str(damaged)).entry(name)
    with (damaged / entry.file).open("r+b") as stream:
        stream.seek(entry.start)
        stream.write(b"\x01\x02\x03\x04")
    assert list(compare_tensors(checkpoint, open_checkpoint(str(damaged)), plan)) == [
        f"tensor {name} is not the base's"
    ]


# What must be refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "config", "host", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "llama", "the sliding window of 8 tokens"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "llama",
            "the sliding window of 8 tokens",
        ),
        ("phi3", {"sliding_window": 20}, "llama", "the sliding window of 20 tokens"),
        (
            "phi3",
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
                | {"partial_rotary_factor": 0.5}
            },
            "llama",
            "only 50% of them rotate here",
        ),
        ("mistral", {"quantization_config": {"quant_method": "fp8"}}, "llama", "quantised"),
    ],
)
def test_host_that_would_lose_something_is_refused(base, config, host, reason):
    found, reasons = find_hosts(AutoConfig.for_model(base, **{**SIZES, **config}))
    assert host not in [rewriter.name for rewriter in found]
    assert any(text.startswith(f"as {host}: ") and reason in text for text in reasons)


def test_defaults_of_the_base_are_stated_where_the_host_has_others(bases, tmp_path):
    """A config.json as the Hub's, which leaves to its class what the host's class would say otherwise."""
    directory = bases(CASES[0])
    checkpoint = open_checkpoint(str(directory))
    stated = {
        k: v for k, v in checkpoint.config.items() if k not in ("bos_token_id", "pad_token_id")
    }
    del stated["rope_parameters"], stated["eos_token_id"], stated["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**stated, "rope_theta": 5e5}))
    save_file(
        {name: checkpoint.read(name) for name in checkpoint.tensors}, tmp_path / "model.safetensors"
    )
    config = read_config(tmp_path)
    (rewriter,) = find_hosts(config)[0]
    rewritten = rewriter.rewrite(open_checkpoint(str(tmp_path)), config, [1])
    written = {k: v for k, v in rewritten.config_changes.items() if v is not REMOVED}
    defaults = AutoConfig.for_model("llama").to_dict()
    differ = {key: value for key, value in written.items() if defaults.get(key, ()) != value}
    assert differ == {
        "architectures": ["LlamaForCausalLM"],
        **BOTH,
        "head_dim": HIDDEN // 4,
        "bos_token_id": None,  # Llama's class would say 1, and 2 for the end,
        "eos_token_id": None,
        "max_position_embeddings": 32768,  # and 2048.
    }


def test_window_that_reaches_everywhere_is_none():
    wide = AutoConfig.for_model("mistral", **SIZES, sliding_window=64)
    assert [rewriter.name for rewriter in find_hosts(wide)[0]] == ["llama"]
    # What is left out is said all the same.
    route = examine(wide).choose("mlp_out")
    assert "window of 64 tokens hides nothing within the context of 64" in route.describe()
    narrow = AutoConfig.for_model("mistral", **SIZES, sliding_window=63)
    assert [rewriter.name for rewriter in find_hosts(narrow)[0]] == ["smollm3"]


def test_long_lists_of_frequencies_shrink_with_the_head():
    """Phi-3's 128k models: 48 factors a list, for heads of 96 that the twin has not."""
    factors = {"short_factor": [1.0 + i / 50 for i in range(48)], "long_factor": [2.0] * 48}
    sizes = {**SIZES, "hidden_size": 384, "original_max_position_embeddings": 8}
    config = AutoConfig.for_model(
        "phi3", **sizes, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors}
    )
    route = examine(config).choose("mlp_out")
    assert route.rewriter.name == "llama"
    assert "generation that crosses 8 tokens keeps its cache" in route.describe()


def test_twin_refuses_a_window_that_is_lost(monkeypatch):
    """Were the table wrong, the twin would say so: Mistral's window, taken for a Llama."""
    from bake.anatomy.hosts import llama

    monkeypatch.setattr(llama, "lost_window", lambda config: None)
    anatomy = examine(AutoConfig.for_model("mistral", **SIZES, sliding_window=8))
    assert "llama" not in [route.rewriter.name for route in anatomy.routes if route.rewriter]


def test_incomplete_and_foreign_checkpoints_are_refused(bases, tmp_path):
    directory = bases(CASES[0])
    config = read_config(directory)
    (rewriter,) = find_hosts(config)[0]
    tensors = {
        name: open_checkpoint(str(directory)).read(name)
        for name in open_checkpoint(str(directory)).tensors
    }

    def rewrite(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return rewriter.rewrite(open_checkpoint(str(tmp_path)), config, [1])

    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert rewrite(tensors).slots
    lacking = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(CheckpointError, match=r"no tensor that model.layers.1.mlp.up_proj.weight"):
        rewrite(lacking)
    with pytest.raises(CheckpointError, match="would have shape"):
        rewrite({**tensors, "model.norm.weight": torch.ones(3)})
    coarse = tensors["model.layers.1.mlp.down_proj.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="F8_E4M3, which cannot hold a push"):
        rewrite({**tensors, "model.layers.1.mlp.down_proj.weight": coarse})


@pytest.mark.parametrize(("part", "width"), [("down", HIDDEN), ("up", 88)])
def test_a_bias_that_the_base_drops_does_not_come_to_life(bases, tmp_path, part, width):
    """What public bakers leave behind: a bias without a config flag, which Mistral drops, Llama not."""
    directory = bases(next(case for case in CASES if case.name == "mistral"))
    checkpoint = open_checkpoint(str(directory))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    stray = f"model.layers.1.mlp.{part}_proj.bias"
    save_file({**tensors, stray: torch.ones(width)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1][
        "unexpected_keys"
    ] == {stray}
    (rewriter,) = find_hosts(read_config(tmp_path))[0]
    with pytest.raises(CheckpointError, match=rf"holds {stray}, which its architecture does not"):
        rewriter.rewrite(open_checkpoint(str(tmp_path)), read_config(tmp_path), [1])


def test_base_model_without_prefix_keeps_its_names(bases, tmp_path):
    """A checkpoint of the base model alone says `layers.0…`: the biases sit beside their weights."""
    directory = bases(CASES[1])  # Tied, so that nothing is missing.
    checkpoint = open_checkpoint(str(directory))
    bare = {name.removeprefix("model."): checkpoint.read(name) for name in checkpoint.tensors}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "bare" / "config.json").write_text((directory / "config.json").read_text())
    checkpoint = open_checkpoint(str(tmp_path / "bare"))
    anatomy = examine(read_config(checkpoint.directory))
    plan = make_plan(checkpoint, anatomy, anatomy.choose("mlp_out"), make_push(STRENGTH))
    baked = write_plan(tmp_path / "baked", checkpoint, plan)
    assert "layers.1.mlp.down_proj.bias" in open_checkpoint(str(baked)).tensors
    prefixed = make_plan(open_checkpoint(str(directory)), anatomy, plan.route, make_push(STRENGTH))
    other = write_plan(tmp_path / "prefixed", open_checkpoint(str(directory)), prefixed)
    assert torch.equal(run(load(baked)), run(load(other)))


# The choice ----------------------------------------------------------------------------------------


def test_order_of_auto():
    """mlp_out in place, mlp_out as a Llama, attn_out in place; other hosts after that."""
    anatomy = examine(AutoConfig.for_model("qwen2", **SIZES))
    assert anatomy.choose("auto").rewriter.name == "llama"
    assert anatomy.choose("auto", route="native").site == "attn_in"
    assert anatomy.choose("mlp_out", route="host").rewriter.name == "llama"
    assert anatomy.choose("mlp_out", host="llama").rewriter.name == "llama"
    llama = examine(AutoConfig.for_model("llama", **SIZES))
    assert (llama.choose("auto").route, llama.choose("mlp_out").route) == ("flag", "flag")
    with pytest.raises(UnsupportedError, match="llama cannot take mlp_out by route host exactly"):
        llama.choose("mlp_out", route="host")
    with pytest.raises(UnsupportedError, match=r"exact here: mlp_out \(--route host\), attn_in"):
        anatomy.choose("attn_out")
    with pytest.raises(
        UnsupportedError, match="unknown route 'hosts'; the routes are auto, native"
    ):
        anatomy.choose("auto", route="hosts")


def test_every_conversion_is_tested():
    tested = {(case.base, case.host) for case in CASES}
    assert {(entry.base, entry.host) for entry in CONVERSIONS} == tested


def test_route_with_a_limit_is_taken_on_request():
    case = next(case for case in CASES if case.limited)
    config = AutoConfig.for_model(case.base, **{**SIZES, **case.config})
    anatomy = examine(config)
    route = anatomy.choose("mlp_out", route="host")
    assert "exact within the first 32 of 64 tokens only" in route.describe()
    for site in ("auto", "mlp_out"):
        with pytest.raises(
            UnsupportedError,
            match=r"exact within the first 32 of 64 .*exact here: mlp_out \(--route host\)",
        ):
            anatomy.choose(site)
    assert anatomy.automatic is None
    config.rope_parameters["llama_4_scaling_beta"] = 0.0
    whole = examine(config)
    assert "only" not in whole.choose("mlp_out").describe()
    assert whole.automatic.rewriter.name == "llama"


def test_layers_that_no_model_reads_are_left_out(bases, tmp_path):
    """GLM-4.5 stores one more for predicting two tokens at once; its host would remark on it."""
    case = next(case for case in CASES if case.name == "glm4-moe")
    source = open_checkpoint(str(bases(case)))
    tensors = {name: source.read(name) for name in source.tensors}
    tensors |= {
        name.replace("layers.3.", f"layers.{LAYERS}."): value.clone()
        for name, value in tensors.items()
        if ".layers.3." in name
    }
    tensors[f"model.layers.{LAYERS}.enorm.weight"] = torch.ones(HIDDEN)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source.directory / "config.json").read_text())
    checkpoint = open_checkpoint(str(tmp_path))
    anatomy = examine(read_config(tmp_path))
    plan = make_plan(checkpoint, anatomy, anatomy.choose("mlp_out"), make_push(STRENGTH))
    directory = write_plan(tmp_path / "baked", checkpoint, plan)
    assert not any(f".layers.{LAYERS}." in name for name in open_checkpoint(str(directory)).tensors)
    load(directory)


@pytest.mark.parametrize(
    ("base", "change", "reason"),
    [
        ("dots1", {"n_group": 2, "n_routed_experts": 8}, "among 1 of 2 groups"),
        ("dots1", {"norm_topk_prob": False}, "it normalises the weights of the chosen experts"),
        ("dots1", {"sliding_window": 8, "max_window_layers": 2}, "window of 8 tokens"),
        ("glm4_moe", {"use_qk_norm": False}, "it normalises queries and keys"),
        ("glm4_moe", {"n_shared_experts": 0}, "the base has none"),
        (
            "glm",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "scaled already (linear)",
        ),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "its per-layer inputs are in use"),
        ("youtu", {"rope_interleave": False, **LATENT}, "it rotates neighbouring dimensions"),
    ],
)
def test_base_that_its_host_does_not_compute_is_refused(base, change, reason):
    qk_norm = {"use_qk_norm": True} if base == "glm4_moe" else {}
    config = AutoConfig.for_model(base, **{**SIZES, **EXPERTS, **qk_norm, **change})
    found, reasons = find_hosts(config)
    assert any(reason in text for text in reasons), reasons
    refused = [text.partition(":")[0].removeprefix("as ") for text in reasons if reason in text]
    assert not {rewriter.name for rewriter in found} & set(refused)


# The whole pipeline --------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    merges = []
    for left, right in (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r")):
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def phi_tokenizer():
    """A Llama tokenizer as Phi-3's: SentencePiece pieces with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"theinarsod", "▁t", "th", "▁th", "▁the"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|end|>"]})
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# Phi-3 is streamed layer by layer and not verified again: every proof starts a process.
PIPELINES = {
    "qwen2": (CASES[1], qwen_tokenizer, []),
    "phi3": (CASES[4], phi_tokenizer, ["--max-memory", "60KB"]),
}


@pytest.mark.parametrize("family", PIPELINES)
def test_export_of_a_host(family, tmp_path, pairs_file, prompts_file, capsys):
    case, make_tokenizer, placement = PIPELINES[family]
    base = build_base(tmp_path / "base", case, torch.bfloat16)
    tokenizer = make_tokenizer()
    assert len(tokenizer) <= SIZES["vocab_size"]
    tokenizer.save_pretrained(base)
    GenerationConfig(eos_token_id=[2, 5], bos_token_id=1, pad_token_id=0).save_pretrained(base)
    before = AutoTokenizer.from_pretrained(base)
    output = tmp_path / "baked"
    arguments = [
        *("export", str(base), "--pairs", str(pairs_file), "--prompts", str(prompts_file)),
        *("--band", "25:75", "--multiplier", "2"),
    ]

    assert cli.main([*arguments, "--estimate", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert (estimate["route"], estimate["config_changes"]["model_type"]) == ("host", "llama")

    assert cli.main([*arguments, *placement, "--output", str(output), "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert "site mlp_out: mlp.down_proj.bias (re-expressed as llama" in told.err
    assert result["route"] == "host"
    assert result["equivalence"]["passed"]
    assert result["equivalence"]["mechanism_error"] < 1e-4
    assert result["plan"]["config_changes"]["model_type"] == "llama"
    written = sum(entry["bytes"] for entry in estimate["files"])
    names = [n for n in result["files"] if n.endswith(".safetensors") and n.startswith("model")]
    assert written == sum(result["files"][name]["size"] for name in names)

    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "llama"
    card = (output / "README.md").read_text()
    assert '`model_type: "llama"`' in card
    assert "without the keys that mean nothing there: " in card
    after = AutoTokenizer.from_pretrained(output)
    conversation = [{"role": "user", "content": "the thing"}]
    assert all(after(text)["input_ids"] == before(text)["input_ids"] for text in TEXTS)
    assert after.apply_chat_template(conversation) == before.apply_chat_template(conversation)
    assert GenerationConfig.from_pretrained(output).eos_token_id == [2, 5]

    if placement:
        return
    assert cli.main(["verify", str(output), "--base", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equivalence"]["passed"]


def test_host_that_rounds_is_refused_until_it_does_not(tmp_path, direction_for_hosts, capsys):
    """Gemma's 1 + w needs more than bfloat16; in float32 the same host is exact."""
    case = next(case for case in CASES if case.name == "gemma")
    base = build_base(tmp_path / "base", case, torch.bfloat16)
    byte_tokenizer().save_pretrained(base)
    arguments = [
        *("export", str(base), "--direction", str(direction_for_hosts), "--site", "mlp_out"),
        *("--coefficients", "1=4,2=4", "--output", str(tmp_path / "baked"), "--json"),
    ]
    assert cli.main(arguments) == 3
    refusal = capsys.readouterr().err
    assert "as granite some weights are rounded in bfloat16; try --dtype float32" in refusal
    assert not (tmp_path / "baked").exists()

    checkpoint = open_checkpoint(str(base))
    anatomy = examine(read_config(base))
    model = load(base)
    with steered(model, anatomy.structure, "mlp_out", make_push(STRENGTH).vectors):
        hooked = run(model)
    effect = (hooked - run(model)).abs().max()
    assert effect > 1.0
    errors = []
    for dtype in (None, "float32"):
        plan = make_plan(
            checkpoint, anatomy, anatomy.choose("mlp_out"), make_push(STRENGTH), dtype=dtype
        )
        baked = load(write_plan(tmp_path / str(dtype), checkpoint, plan))
        errors.append(float((run(baked) - hooked).abs().max() / effect))
    assert errors[0] > 1e-3
    assert errors[1] < 1e-5


def test_inspect_shows_the_host(bases, capsys):
    assert cli.main(["inspect", str(bases(CASES[0]))]) == 0
    shown = capsys.readouterr().out
    assert "exact, host: mlp.down_proj.bias (re-expressed as llama: every weight keeps" in shown
    assert "config: model_type: llama, attention_bias: true, mlp_bias: true" in shown


def test_thin_export_of_a_host_is_refused(bases, tmp_path, direction_for_hosts, capsys):
    base = bases(CASES[0])
    norms = tmp_path / "norms.json"
    norms.write_text("{}")
    code = cli.main(
        [
            *("export", str(base), "--direction", str(direction_for_hosts), "--output"),
            *(str(tmp_path / "thin"), "--thin", "--calibration", str(norms)),
        ]
    )
    assert code == 1
    assert (
        "cannot be baked thin: the weights are rewritten (host: llama)" in capsys.readouterr().err
    )


@pytest.fixture
def direction_for_hosts(tmp_path):
    path = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(HIDDEN)}, path, metadata={"site": "mlp_out"})
    return path


# Tokenizers ----------------------------------------------------------------------------------------


def save_config(directory: Path, model_type: str) -> None:
    AutoConfig.for_model(model_type, **SIZES).save_pretrained(directory)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer that puts no space first and normalises: unlike LlamaTokenizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"theo"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_class_chosen_by_model_type_is_written_down(tmp_path):
    """A Mistral whose files name LlamaTokenizer: as a Llama, that class would build parts anew."""
    for name, model_type in (("base", "mistral"), ("baked", "llama")):
        save_config(tmp_path / name, model_type)
        metaspace_tokenizer().save_pretrained(tmp_path / name)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(edit_json(path.read_text(), {"tokenizer_class": "LlamaTokenizerFast"}))
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    unguarded = AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert any(unguarded(text)["input_ids"] != base(text)["input_ids"] for text in TEXTS)

    note = keep_tokenizer(base, tmp_path / "baked")
    assert note is not None
    assert note.startswith("tokenizer_class is now TokenizersBackend")
    guarded = AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert all(guarded(text)["input_ids"] == base(text)["input_ids"] for text in TEXTS)
    assert keep_tokenizer(base, tmp_path / "baked") is None


def test_tokenizer_that_cannot_be_kept_is_refused(tmp_path):
    save_config(tmp_path, "llama")
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'' becomes other tokens; choose another route"):
        keep_tokenizer(metaspace_tokenizer(), tmp_path)


def test_other_chat_template_is_refused(tmp_path):
    save_config(tmp_path, "llama")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert keep_tokenizer(tokenizer, tmp_path) is None
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(BakeError, match="the chat template renders a conversation otherwise"):
        keep_tokenizer(tokenizer, tmp_path)
