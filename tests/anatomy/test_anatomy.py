"""Anatomy: which sites are exact by which route, why others are refused, and that the twin can fail."""

import re
from dataclasses import replace
from functools import cache
from logging import Handler

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from bake.anatomy import TwinVerdict, examine
from bake.anatomy.examination import forget_examinations
from bake.anatomy.flags import added_parameters, build_on_meta, find_bias_flags, parameter_shapes
from bake.anatomy.residual import trace_residual
from bake.anatomy.scales import scale_of_real
from bake.anatomy.shrink import shrink
from bake.anatomy.slots import propose_slots
from bake.anatomy.structure import find_decoder_layers, find_structure
from bake.anatomy.twin import Twin, build_random, fold
from bake.checkpoint.loading import single_thread
from bake.errors import UnsupportedError
from bake.hooks import steered
from bake.sites import SITES, LayerStructure, Slot


@pytest.fixture(autouse=True)
def no_hosts(monkeypatch, examined_anew):
    """Here is what is exact in place; hosts are test_hosts' business."""
    monkeypatch.setattr("bake.anatomy.examination.find_hosts", lambda *_: ([], []))


LLAMA_PARTS = LayerStructure("model.layers", "self_attn", "mlp", "post_attention_layernorm")


# Fewer layers where a real model of full size on the meta device takes long to build.
FEW = {
    name: {"num_hidden_layers": 4} for name in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
}


@cache
def anatomy(model_type, **options):
    return examine(CONFIG_MAPPING[model_type](**FEW.get(model_type, {}), **options))


@cache
def twin_of(model_type, **options):
    return Twin(CONFIG_MAPPING[model_type](**options))


def short(name):
    return re.split(r"\.\d+\.", name, maxsplit=1)[1]


def in_place(found):
    """The routes in the architecture itself that are taken without being asked for."""
    return [route for route in found.routes if route.rewriter is None and not route.on_request]


def routes(found):
    """{site: [(flags, names of the slots inside the layer)]} of an anatomy."""
    table = {}
    for route in in_place(found):
        entry = (" ".join(route.flags), " ".join(short(slot.bias) for slot in route.slots_of(0)))
        table.setdefault(route.site, []).append(entry)
    return table


QKV = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"
GATED = "mlp.gate_proj.bias mlp.up_proj.bias"
ATTENTION_FLAG = {
    "attn_out": [("attention_bias", "self_attn.o_proj.bias")],
    "attn_in": [("attention_bias", QKV)],
}
BOTH_FLAGS = {
    "mlp_out": [("mlp_bias", "mlp.down_proj.bias")],
    **ATTENTION_FLAG,
    "mlp_in": [("mlp_bias", GATED)],
}
# What can be exact in place, from the survey of tiny models in the project's notes.
FAMILIES = {
    "llama": BOTH_FLAGS,
    "granite": BOTH_FLAGS,
    "smollm3": BOTH_FLAGS,
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "qwen2": {"attn_in": [("", QKV)]},
    "glm4": {"attn_in": [("", QKV)]},
    "qwen3": ATTENTION_FLAG,
    "qwen3_moe": ATTENTION_FLAG,
    "gemma": ATTENTION_FLAG,
    "olmo": ATTENTION_FLAG,
    "gemma2": {"attn_in": [("attention_bias", QKV)]},
    "gemma3_text": {"attn_in": [("attention_bias", QKV)]},
    "olmo2": {"attn_in": [("attention_bias", QKV)]},
    "deepseek_v3": {
        "attn_out": [("attention_bias", "self_attn.o_proj.bias")],
        "attn_in": [
            ("attention_bias", "self_attn.q_a_proj.bias self_attn.kv_a_proj_with_mqa.bias")
        ],
    },
    # Attention and MLP are added together, so attention's output bias is a write after the MLP's add.
    "cohere": {
        "mlp_out": [("attention_bias", "self_attn.o_proj.bias")],
        "attn_in": [("attention_bias", QKV)],
    },
    "phi": {
        "mlp_out": [("", "mlp.fc2.bias")],
        "attn_in": [("", QKV)],
        "mlp_in": [("", "mlp.fc1.bias")],
    },
    # The experts' weights sum to one, so v in the bias of each is v in the sum.
    "gpt_oss": {
        "mlp_out": [("", "mlp.experts.down_proj_bias")],
        "attn_out": [("", "self_attn.o_proj.bias")],
        "attn_in": [("", QKV)],
        "mlp_in": [("", "mlp.router.bias mlp.experts.gate_up_proj_bias")],
    },
    "stablelm": {
        "attn_in": [("", "input_layernorm.bias"), ("use_qkv_bias", QKV)],
        "mlp_in": [("", "post_attention_layernorm.bias")],
    },
    "starcoder2": {
        "mlp_out": [("", "mlp.c_proj.bias")],
        "attn_out": [("", "self_attn.o_proj.bias")],
        "attn_in": [("", "input_layernorm.bias"), ("", QKV)],
        "mlp_in": [("", "post_attention_layernorm.bias"), ("", "mlp.c_fc.bias")],
    },
    "bloom": {
        "mlp_out": [("", "mlp.dense_4h_to_h.bias")],
        "attn_out": [("", "self_attention.dense.bias")],
        "attn_in": [("", "input_layernorm.bias"), ("", "self_attention.query_key_value.bias")],
        "mlp_in": [("", "post_attention_layernorm.bias"), ("", "mlp.dense_h_to_4h.bias")],
    },
    "gpt2": {
        "mlp_out": [("", "mlp.c_proj.bias")],
        "attn_out": [("", "attn.c_proj.bias")],
        "attn_in": [("", "ln_1.bias"), ("", "attn.c_attn.bias")],
        "mlp_in": [("", "ln_2.bias"), ("", "mlp.c_fc.bias")],
    },
    "opt": {
        "mlp_out": [("", "fc2.bias")],
        "attn_out": [("", "self_attn.out_proj.bias")],
        "attn_in": [
            ("", "self_attn_layer_norm.bias"),
            ("", QKV),
        ],
        "mlp_in": [("", "final_layer_norm.bias"), ("", "fc1.bias")],
    },
    "gpt_neox": {
        "mlp_out": [("", "mlp.dense_4h_to_h.bias")],
        "attn_in": [("", "input_layernorm.bias"), ("", "attention.query_key_value.bias")],
        "mlp_in": [("", "post_attention_layernorm.bias"), ("", "mlp.dense_h_to_4h.bias")],
    },
    "falcon": {
        "mlp_out": [("bias", "mlp.dense_4h_to_h.bias")],
        "attn_in": [("bias", "self_attention.query_key_value.bias")],
        "mlp_in": [("bias", "mlp.dense_h_to_4h.bias")],
    },
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_exact_sites_of_a_family(family):
    assert routes(anatomy(family)) == FAMILIES[family]


@every_family
def test_every_site_has_a_route_or_a_reason(family):
    found = anatomy(family)
    assert set(found.refusals) == set(SITES) - {route.site for route in found.routes}
    assert all(len(reason) > 20 for reason in found.refusals.values())


@every_family
def test_every_route_is_proven_on_the_twin(family):
    for route in in_place(anatomy(family)):
        assert route.twin.passed
        assert route.twin.greedy_equal
        assert route.layers == tuple(range(anatomy(family).layer_count))
        assert route.twin.effect > 0.1
        assert route.twin.push_error < 1e-5
        assert route.route == ("flag" if route.flags else "native")
        assert bool(route.new_parameters) == bool(route.flags)


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("mistral", "mlp_out", "mlp has no bias that moves only this activation"),
        ("mistral", "attn_out", "self_attn has no bias that moves only this activation"),
        ("mistral", "attn_in", "no flag of the config creates self_attn.q_proj.bias"),
        ("qwen2", "mlp_out", "mlp has no bias that moves only this activation"),
        ("qwen3", "mlp_out", "flags of the config: attention_bias"),
        ("qwen3", "mlp_in", "no flag of the config creates mlp.gate_proj.bias, mlp.up_proj.bias"),
        ("gemma2", "attn_out", "attention's output is not simply added to the residual stream"),
        ("gemma2", "mlp_out", "mlp has no bias that moves only this activation"),
        ("gemma2", "attn_out", "post_attention_layernorm normalises it first"),
        ("gemma3_text", "attn_out", "post_attention_layernorm normalises it first"),
        ("olmo2", "attn_out", "post_attention_layernorm normalises it first"),
        ("glm4", "attn_out", "post_self_attn_layernorm normalises it first"),
        ("gpt_neox", "attn_out", "attention's output is not simply added to the residual stream"),
        ("falcon", "attn_out", "attention's output is not simply added to the residual stream"),
        ("cohere", "attn_out", "(a parallel block), where mlp_out is the site"),
        ("phi", "attn_out", "(a parallel block), where mlp_out is the site"),
        ("mixtral", "mlp_in", "no flag of the config creates mlp.gate.bias"),
        ("deepseek_v3", "mlp_in", "no flag of the config creates mlp.gate_proj.bias"),
    ],
)
def test_refusal_says_why(family, site, reason):
    assert reason in anatomy(family).refusals[site]


def test_attention_of_a_sequential_block_is_a_residual_write():
    """GPT-NeoX can be built either way; only the flag of its config tells."""
    found = anatomy("gpt_neox", use_parallel_residual=False)
    assert routes(found)["attn_out"] == [("", "attention.dense.bias")]


@pytest.mark.parametrize("multiplier", [0.5, 0.22])
def test_residual_multiplier_becomes_the_slots_scale(multiplier):
    found = anatomy("granite", residual_multiplier=multiplier)
    scales = {route.site: {slot.scale for slot in route.slots_of(0)} for route in found.routes}
    assert scales == {
        "mlp_out": {multiplier},
        "attn_out": {multiplier},
        "attn_in": {1.0},
        "mlp_in": {1.0},
    }
    assert found.structure.attention_scale == multiplier
    assert anatomy("granite").structure.attention_scale == 1.0


def test_real_sizes_come_from_the_config_not_from_the_twin():
    found = anatomy("llama")
    assert (found.architecture, found.model_type) == ("LlamaForCausalLM", "llama")
    assert (found.layer_count, found.hidden_size) == (32, 4096)
    assert (anatomy("gpt2").layer_count, anatomy("gpt2").hidden_size) == (12, 768)
    assert (anatomy("opt").structure.layers, anatomy("opt").prefix) == (
        "model.decoder.layers",
        "model.",
    )


def test_flag_adds_its_parameters_on_every_layer():
    found = anatomy("llama").choose("mlp_out").new_parameters
    sizes = {"gate_proj": 11008, "up_proj": 11008, "down_proj": 4096}
    assert found == {
        f"model.layers.{layer}.mlp.{name}.bias": (size,)
        for layer in range(32)
        for name, size in sizes.items()
    }
    assert anatomy("llama").choose("mlp_out").added_values == 32 * (2 * 11008 + 4096)


def test_added_parameters_follow_the_real_shapes():
    config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=4, vocab_size=96)
    found = added_parameters(config, {"attention_bias": True})
    assert found["model.layers.1.self_attn.k_proj.bias"] == (4 * 128,)
    assert len(found) == 2 * 4
    assert added_parameters(config, {"mlp_bias": False}) == {}


def test_slots_of_a_layer_have_its_index():
    (slot,) = anatomy("gpt2").choose("attn_in", kind="projection").slots_of(7)
    assert slot.bias == "transformer.h.7.attn.c_attn.bias"
    assert slot.weight == "transformer.h.7.attn.c_attn.weight"
    assert slot.transposed
    assert not any(slot.transposed for slot in anatomy("llama").choose("attn_in").slots_of(0))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"attn.c_attn.bias": (1 / 3, 2 / 3)}),
        ("opt", {"self_attn.k_proj.bias": (0.0, 1.0)}),
        ("llama", {}),
        ("qwen2", {}),
    ],
)
def test_inert_part_of_a_key_bias(family, expected):
    route = anatomy(family).choose("attn_in", kind="projection")
    assert {
        short(slot.bias): pytest.approx(slot.inert) for slot in route.slots_of(0) if slot.inert
    } == expected
    assert len(route.slots_of(0)) >= 1


def test_inert_part_of_a_real_model_with_one_key_head():
    """StarCoder's fused bias is 6 parts query, 1 key, 1 value here, and 4, 1, 1 on the twin."""
    config = CONFIG_MAPPING["gpt_bigcode"](n_embd=48, n_head=6, n_layer=2, vocab_size=96)
    slot = examine(config).choose("attn_in", kind="projection").slots_of(0)[0]
    assert parameter_shapes(build_on_meta(config))["transformer.h.0.attn.c_attn.bias"] == (64,)
    assert slot.inert is None or slot.inert == pytest.approx((48 / 64, 56 / 64))


def test_auto_prefers_a_write_after_the_mlp():
    assert anatomy("llama").choose("auto").site == "mlp_out"
    assert anatomy("qwen3").choose("auto").site == "attn_out"
    assert anatomy("qwen2").choose("auto").site == "attn_in"


def test_auto_considers_only_sites_that_suit_the_direction():
    assert anatomy("llama").choose("auto", found_at="attn_out").site == "mlp_out"
    assert anatomy("llama").choose("auto", found_at="mlp_in").site == "mlp_in"
    assert anatomy("qwen3").choose("auto", found_at="attn_in").site == "attn_in"
    with pytest.raises(UnsupportedError, match=r"qwen2 cannot take .*; exact here: .*attn_in"):
        anatomy("qwen2").choose("auto", found_at="mlp_out")


def test_kind_of_slot_can_be_chosen():
    found = anatomy("gpt2")
    assert short(found.choose("mlp_in", kind="norm").slots_of(0)[0].bias) == "ln_2.bias"
    assert short(found.choose("mlp_in", kind="projection").slots_of(0)[0].bias) == "mlp.c_fc.bias"
    with pytest.raises(UnsupportedError, match="no norm slot"):
        anatomy("llama").choose("attn_in", kind="norm")


def test_refused_site_names_the_reason_and_what_works_instead():
    with pytest.raises(
        UnsupportedError, match=r"gemma2 cannot take attn_out .* not simply added .*: attn_in"
    ):
        anatomy("gemma2").choose("attn_out")
    with pytest.raises(UnsupportedError, match=r"mistral cannot take .*exact here: no site"):
        anatomy("mistral").choose("mlp_out")


def test_unknown_site_names_the_sites():
    with pytest.raises(UnsupportedError, match=r"unknown site 'resid'; the sites are mlp_out, "):
        anatomy("llama").choose("resid")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_examine_leaves_the_process_as_it_was(family):
    config = CONFIG_MAPPING[family]()
    values, threads = config.to_dict(), torch.get_num_threads()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        examine(config)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert config.to_dict() == values


def test_single_thread_is_one_and_ends_on_an_exception():
    threads, inside = torch.get_num_threads(), []

    def fail():
        with single_thread():
            inside.append(torch.get_num_threads())
            raise RuntimeError("on purpose")

    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert (inside, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


def test_examine_gives_the_same_every_time():
    known = anatomy("qwen3").to_dict()
    forget_examinations()
    assert examine(CONFIG_MAPPING["qwen3"]()).to_dict() == known


def test_an_equal_configuration_is_examined_once(monkeypatch):
    config = CONFIG_MAPPING["llama"](num_hidden_layers=3)
    known = examine(config)
    monkeypatch.setattr("bake.anatomy.examination._Examination", None)  # Nothing can be examined.
    again = CONFIG_MAPPING["llama"](num_hidden_layers=3, name_or_path="elsewhere")
    found = examine(again)
    assert found == known
    assert found.config is again
    for options in ({"num_hidden_layers": 4}, {"num_hidden_layers": 3, "rope_theta": 7.0}):
        with pytest.raises(UnsupportedError, match="no small twin"):
            examine(CONFIG_MAPPING["llama"](**options))


def sites_or_refusal(model_type):
    """The sites that an examination judged, or the line that says why there was none."""
    try:
        found = examine(CONFIG_MAPPING[model_type]())
    except UnsupportedError as error:
        return str(error)
    return set(found.refusals) | {route.site for route in found.routes}


@pytest.mark.parametrize("model_type", ["gemma3", "llama4"])
def test_twin_of_a_model_with_several_towers_is_small_or_refused(model_type, monkeypatch):
    """Nested configs have sizes too: a twin of full size would fill the memory."""
    from bake.anatomy import twin as module

    def guarded(config, seed):
        parameters = sum(p.numel() for p in build_on_meta(config).parameters())
        assert parameters < 5_000_000, f"the twin has {parameters:,} parameters"
        return build_random(config, seed)

    monkeypatch.setattr(module, "build_random", guarded)
    assert sites_or_refusal(model_type)


@pytest.mark.parametrize(
    "model_type", ["gptj", "deepseek_v3", "ernie4_5_moe", "gemma4_text", "mamba2"]
)
def test_architecture_that_cannot_be_examined_is_refused_in_one_line(model_type):
    found = sites_or_refusal(model_type)
    assert "\n" not in found if isinstance(found, str) else found == set(SITES)


def test_model_type_without_a_causal_language_model_is_refused():
    with pytest.raises(UnsupportedError, match="no causal language model for model type 'clip'"):
        examine(CONFIG_MAPPING["clip"]())


# --- a wrong slot fails on the twin -------------------------------------------------------------


def at_layer(slot, layer):
    weight = slot.weight.format(layer=layer) if slot.weight else None
    return replace(slot, bias=slot.bias.format(layer=layer), weight=weight)


def slots_for(twin, *slots):
    """The same slots on each of the twin's layers; names hold {layer}."""
    layers = range(twin.config.num_hidden_layers)
    return {layer: [at_layer(slot, layer) for slot in slots] for layer in layers}


def verdict(twin, site, flags, *slots, structure=LLAMA_PARTS):
    return twin.prove(structure, site, flags, slots_for(twin, *slots))


DOWN = Slot("model.layers.{layer}.mlp.down_proj.bias")
MLP_FLAG, ATTENTION = {"mlp_bias": True}, {"attention_bias": True}


def qkv(**changes):
    stem = "model.layers.{layer}.self_attn."
    return [Slot(f"{stem}{n}_proj.bias", f"{stem}{n}_proj.weight", **changes) for n in "qkv"]


def test_right_slots_pass():
    twin = twin_of("llama")
    for found in (
        verdict(twin, "mlp_out", MLP_FLAG, DOWN),
        verdict(twin, "attn_in", ATTENTION, *qkv()),
    ):
        assert found.passed
        assert found.reason is None


def test_wrong_scale_fails_by_as_much_as_it_is_wrong():
    found = verdict(twin_of("llama"), "mlp_out", MLP_FLAG, replace(DOWN, scale=1.01))
    assert not found.passed
    assert 1e-3 < found.push_error < 3e-2
    assert "differs from the hook by" in found.reason
    assert found.zero_push_error == 0


def test_wrong_orientation_fails():
    assert twin_of("llama").model.model.layers[0].self_attn.k_proj.weight.shape == (32, 32)
    found = verdict(twin_of("llama"), "attn_in", ATTENTION, *qkv(transposed=True))
    assert found.push_error > 0.1
    assert "differs from the hook by" in found.reason


def test_missing_projection_fails():
    found = verdict(twin_of("llama"), "attn_in", ATTENTION, *qkv()[:2])
    assert found.push_error > 0.1
    assert not found.passed


def test_other_bias_of_the_same_width_fails():
    output = Slot("model.layers.{layer}.self_attn.o_proj.bias")
    assert not verdict(twin_of("llama"), "mlp_out", ATTENTION, output).passed
    assert verdict(twin_of("llama"), "attn_out", ATTENTION, output).passed


def test_gate_in_place_of_down_fails(monkeypatch):
    """With a feed-forward width like the hidden size the wrong bias fits, and only the twin tells."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=96,
    )
    monkeypatch.setattr("bake.anatomy.twin.shrink", lambda given, _keep: given)
    twin = Twin(config)
    assert verdict(twin, "mlp_out", MLP_FLAG, DOWN).passed
    found = verdict(twin, "mlp_out", MLP_FLAG, Slot("model.layers.{layer}.mlp.gate_proj.bias"))
    assert found.push_error > 0.1
    assert "differs from the hook by" in found.reason


def test_post_norm_makes_the_output_bias_of_attention_no_residual_write():
    """The bias agrees with a hook on attention's output, so only the measured scale can tell."""
    twin = twin_of("gemma2")
    structure = replace(LLAMA_PARTS, before_mlp="pre_feedforward_layernorm")
    slot = Slot("model.layers.{layer}.self_attn.o_proj.bias")
    assert verdict(twin, "attn_out", ATTENTION, slot, structure=structure).passed
    found, reason = trace_residual(twin, structure, layer=1)
    assert found.before_mlp is None
    assert "post_attention_layernorm normalises it first" in reason
    found, reason = trace_residual(twin_of("llama"), LLAMA_PARTS, layer=1)
    assert (found.before_mlp, found.attention_scale) == ("post_attention_layernorm", 1.0)
    assert reason is None


def test_layer_that_gets_no_slot_fails():
    twin = twin_of("llama")
    slots = slots_for(twin, DOWN)
    slots[1] = []
    assert not twin.prove(LLAMA_PARTS, "mlp_out", MLP_FLAG, slots).passed


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"zero_push_error": 1e-3}, "a zero push moves the logits by 1.0e-03"),
        ({"push_error": 0.01}, "differs from the hook by 1.0e-02 of its effect"),
        ({"effect": 0.0}, "the hook has no effect"),
        ({"reload_clean": False}, "does not reload cleanly"),
        ({"zero_push_error": float("nan")}, ""),
        ({"push_error": float("nan")}, ""),
    ],
)
def test_verdict_fails_for_each_reason(changes, reason):
    sound = TwinVerdict(
        zero_push_error=0.0, push_error=1e-7, effect=2.0, reload_clean=True, greedy_equal=True
    )
    assert sound.passed
    found = replace(sound, **changes)
    assert not found.passed
    assert reason in found.reason
    assert found.to_dict()["passed"] is False


# --- flags are discovered by what they do -------------------------------------------------------


class OddConfig(LlamaConfig):
    """A Llama whose one flag has an unheard-of name; `variant` says what the flag does."""

    model_type = "odd_llama"
    odd_BIASES_switch: bool = False  # noqa: N815
    variant: str = "working"

    def to_dict(self):
        values = super().to_dict()
        if self.variant == "forgotten":
            values.pop("odd_BIASES_switch")
        return values


class IdleLinear(nn.Linear):
    """A linear layer whose bias is there, saved and loaded, and never used."""

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight)


class LoudLinear(nn.Linear):
    """A linear layer that does something else besides adding its bias."""

    def forward(self, inputs):
        return 1.5 * nn.functional.linear(inputs, self.weight) + self.bias


LINEAR = {
    "working": nn.Linear,
    "forgotten": nn.Linear,
    "idle": IdleLinear,
    "loud": LoudLinear,
    "lossy": nn.Linear,
}


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        if config.variant == "lossy":
            # Neither saved nor the same in two models, as a wrongly tied weight is not.
            self.register_buffer("offset", torch.rand(1), persistent=False)
            self.lm_head.register_forward_hook(
                lambda _module, _inputs, out: out + self.offset * out
            )
        if config.odd_BIASES_switch:
            for layer in self.model.layers:
                old = layer.mlp.down_proj
                layer.mlp.down_proj = LINEAR[config.variant](old.in_features, old.out_features)
            self.post_init()


@pytest.fixture(scope="module")
def odd():
    """Return a function: variant → the anatomy of a Llama whose flag does that."""
    AutoConfig.register("odd_llama", OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)
    yield lambda variant: examine(OddConfig(variant=variant, vocab_size=96, num_hidden_layers=3))
    CONFIG_MAPPING._extra_content.pop("odd_llama")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OddConfig)


def odd_route(found):
    """The flags by which mlp_out is exact, or why it is not."""
    exact = [dict(route.flags) for route in found.routes if route.site == "mlp_out"]
    return exact or found.refusals["mlp_out"]


@pytest.fixture
def only_the_odd_flag(monkeypatch):
    """Hide Llama's own flags, which would give an exact route of their own."""
    from bake.anatomy import examination as module

    def odd_only(config):
        return [effect for effect in find_bias_flags(config) if effect.path == "odd_BIASES_switch"]

    monkeypatch.setattr(module, "find_bias_flags", odd_only)


def test_flag_of_any_name_is_found(odd, only_the_odd_flag):
    assert odd_route(odd("working")) == [{"odd_BIASES_switch": True}]


def test_flag_whose_bias_does_nothing_is_refused(odd, only_the_odd_flag):
    reason = odd_route(odd("idle"))
    assert "no bias that moves only this activation" in reason
    assert "odd_BIASES_switch" in reason


def test_flag_that_does_something_else_too_is_refused(odd, only_the_odd_flag):
    assert "a zero push moves the logits by" in odd_route(odd("loud"))


def test_flag_that_the_saved_config_forgets_is_refused(odd, only_the_odd_flag):
    assert "does not reload cleanly" in odd_route(odd("forgotten"))


def test_model_that_does_not_survive_saving_is_refused(odd):
    found = odd("lossy")
    assert not found.routes
    for site in SITES:
        assert "does not save and reload this architecture unchanged" in found.refusals[site]


def test_flag_that_changes_what_is_there_is_no_bias_flag():
    """`use_bias` may also drop a parameter or change a shape; such a flag converts no weights."""

    class Config(LlamaConfig):
        model_type = "replacing_llama"
        replacing_bias: bool = False
        resizing_bias: bool = False
        adding_bias: bool = False

    class Replacing(LlamaForCausalLM):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            width = config.hidden_size
            if config.replacing_bias or config.resizing_bias or config.adding_bias:
                self.model.norm.bias = nn.Parameter(torch.zeros(width))
            if config.replacing_bias:
                del self.model.norm.weight
            if config.resizing_bias:
                self.model.norm.weight = nn.Parameter(torch.ones(2 * width))

    AutoConfig.register("replacing_llama", Config)
    AutoModelForCausalLM.register(Config, Replacing)
    try:
        config = Config(num_hidden_layers=1, hidden_size=32, intermediate_size=48, vocab_size=96)
        found = {effect.path: effect.adds for effect in find_bias_flags(config)}
    finally:
        CONFIG_MAPPING._extra_content.pop("replacing_llama")
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(Config)
    assert found["adding_bias"] == {"model.norm.bias"}
    assert "replacing_bias" not in found
    assert "resizing_bias" not in found


def test_flags_of_llama_and_what_they_create():
    effects = {effect.path: effect.adds for effect in find_bias_flags(twin_of("llama").config)}
    assert sorted(effects) == ["attention_bias", "mlp_bias"]
    assert len(effects["mlp_bias"]) == 3 * 3
    assert all(name.endswith(".bias") for adds in effects.values() for name in adds)


def test_flag_that_is_on_is_no_effect():
    config = twin_of("llama", mlp_bias=True).config
    assert [effect.path for effect in find_bias_flags(config)] == ["attention_bias"]
    assert routes(anatomy("llama", mlp_bias=True))["mlp_out"] == [("", "mlp.down_proj.bias")]


# --- structure, shrinking, the twin's own arithmetic --------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected", "attn_in_norm", "mlp_in_norm"),
    [
        ("llama", LLAMA_PARTS, "input_layernorm", "post_attention_layernorm"),
        ("gpt2", LayerStructure("transformer.h", "attn", "mlp", "ln_2"), "ln_1", "ln_2"),
        (
            "opt",
            LayerStructure("model.decoder.layers", "self_attn", "fc1", "final_layer_norm"),
            "self_attn_layer_norm",
            "final_layer_norm",
        ),
        (
            "gpt_neox",
            LayerStructure("gpt_neox.layers", "attention", "mlp", None),
            "input_layernorm",
            "post_attention_layernorm",
        ),
        (
            "falcon",
            LayerStructure("transformer.h", "self_attention", "mlp", None),
            "input_layernorm",
            "input_layernorm",
        ),
        (
            "gemma2",
            replace(LLAMA_PARTS, before_mlp=None),
            "input_layernorm",
            "pre_feedforward_layernorm",
        ),
    ],
)
def test_structure_of_a_family(family, expected, attn_in_norm, mlp_in_norm):
    found = anatomy(family).structure
    assert replace(found, input_norms={}) == expected
    norms = {"attn_in": attn_in_norm, "mlp_in": mlp_in_norm}
    assert found.input_norms == {site: name for site, name in norms.items() if name}


def layer_list(count, width):
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(count))


def test_decoder_is_not_the_larger_vision_tower():
    model = nn.ModuleDict({"vision_tower": layer_list(9, 32), "text": layer_list(2, 8)})
    assert find_decoder_layers(model) == ("text", 2)


def test_decoder_is_not_a_list_of_experts_inside_a_layer():
    layers = nn.ModuleList(nn.ModuleDict({"experts": layer_list(8, 16)}) for _ in range(3))
    assert find_decoder_layers(nn.ModuleDict({"layers": layers})) == ("layers", 3)


def test_model_without_a_list_of_layers_is_refused():
    with pytest.raises(UnsupportedError, match="keeps no list of decoder layers"):
        find_decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_norm_before_the_mlp_where_there_are_four():
    model = build_on_meta(shrink(CONFIG_MAPPING["gemma2"]()))
    found = find_structure(model, "model.layers")
    assert found.before_mlp == "pre_feedforward_layernorm"


def test_shrunk_config_is_small_and_of_the_same_kind():
    config = CONFIG_MAPPING["gemma2"](final_logit_softcapping=12.5, hidden_activation="gelu")
    small = shrink(config)
    assert type(small) is type(config)
    assert sum(p.numel() for p in build_on_meta(small).parameters()) < 100_000
    assert (small.final_logit_softcapping, small.hidden_activation) == (12.5, "gelu")
    assert small.tie_word_embeddings == config.tie_word_embeddings
    assert config.hidden_size == 2304


@pytest.mark.parametrize(("heads", "kept"), [(32, 4), (8, 2), (1, 1)])
def test_shrunk_config_keeps_the_way_heads_are_grouped(heads, kept):
    small = shrink(LlamaConfig(num_attention_heads=32, num_key_value_heads=heads))
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, kept)


def test_random_model_has_no_parameter_left_at_its_initial_value():
    model = build_random(shrink(CONFIG_MAPPING["gpt2"]()), seed=0)
    for name, parameter in model.named_parameters():
        assert parameter.unique().numel() > parameter.numel() // 2, name
        assert parameter.dtype == torch.float32
    again = build_random(shrink(CONFIG_MAPPING["gpt2"]()), seed=0)
    other = build_random(shrink(CONFIG_MAPPING["gpt2"]()), seed=1)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_fold_adds_to_what_is_there():
    model = build_random(shrink(CONFIG_MAPPING["gpt2"]()), seed=0)
    bias = model.transformer.h[1].mlp.c_proj.bias
    before, push = bias.detach().clone(), torch.arange(32.0)
    fold(model, {1: [Slot("transformer.h.1.mlp.c_proj.bias", scale=0.5)]}, {1: push})
    torch.testing.assert_close(bias.detach(), before + 2 * push)


def test_proposals_for_an_input_site():
    twin = twin_of("gpt2")
    found = anatomy("gpt2").structure
    kinds = {p.kind: p for p in propose_slots(twin, twin.model, found, "attn_in")}
    assert sorted(kinds) == ["norm", "projection"]
    assert [short(slot.bias) for slot in kinds["norm"].slots_of(0)] == ["ln_1.bias"]


def test_what_transformers_says_of_a_twin_is_not_said_to_the_user():
    """A twin's sizes do not fit its rope scaling, of which transformers warns once for every factor."""

    def config(factor: float):
        rotary = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor}
        rotary["original_max_position_embeddings"] = 4096
        sizes = {"num_hidden_layers": 2, "max_position_embeddings": int(4096 * factor)}
        return AutoConfig.for_model("llama", **sizes, rope_parameters=rotary)

    said: list[str] = []
    handler = Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.set_verbosity_warning()
    logging.add_handler(handler)
    try:
        shrink(config(30.0), range(2))
        assert any("original_max_position_embeddings" in message for message in said)
        said.clear()
        examine(config(31.0))
    finally:
        logging.remove_handler(handler)
        logging.set_verbosity_error()
    assert said == []


@pytest.mark.parametrize("site", ["mlp_out", "attn_out"])
def test_a_factor_that_follows_from_a_size_is_the_real_models(site):
    """MiniCPM 3 scales each branch by the number of layers, of which the twin has three."""
    values = {"num_hidden_layers": 12, "scale_depth": 1.4, "hidden_size": 32, "vocab_size": 96}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 80}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8, "dim_model_base": 16}
    rotary = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "pad_token_id": 0}
    config = AutoConfig.for_model("minicpm3", **values, **sizes, **heads, **rotary)
    found = examine(config)
    route = found.choose(site)
    assert {slot.scale for slot in route.slots_of(5)} == {1.4 / 12**0.5}
    with torch.random.fork_rng():
        real = build_random(config, 0)
    ids = torch.arange(3, 15).reshape(1, -1)
    push = torch.randn(32, generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}

    def stream(name: str) -> None:
        # What the next thing on the residual stream reads is the stream itself.
        reader = (
            real.model.layers[5].post_attention_layernorm
            if site == "attn_out"
            else real.model.layers[6].input_layernorm
        )
        handle = reader.register_forward_pre_hook(lambda _, given: seen.update({name: given[0]}))
        with torch.no_grad():
            real(input_ids=ids)
        handle.remove()

    stream("base")
    with steered(real, found.structure, site, {5: push}):
        stream("hooked")
    assert torch.allclose(seen["hooked"] - seen["base"], push.expand(1, 12, 32), atol=1e-4)


def test_one_is_no_factor_that_a_layer_keeps():
    layers = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)]
    layers[0].scaling, layers[1].scaling = 1.0, 0.25  # of a head that is one wide, as it were
    assert scale_of_real(1.0, *layers) == 1.0
    layers[0].scaling = 0.5
    assert scale_of_real(0.5, *layers) == 0.25
