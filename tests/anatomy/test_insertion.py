"""Inserted layers: exact on every family that has no slot of its own, and honest about their cost."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from conftest import TinyModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from bake.anatomy import examine
from bake.anatomy.insertion.growth import (
    Place,
    arrange,
    check_growth,
    grow_config,
    plan_growth,
)
from bake.anatomy.twin import build_random
from bake.api import estimate, export, inspect, verify
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.edits import Drop, Rename
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.writer import write_config, write_weights
from bake.cli.main import main
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.errors import CheckpointError, UnsupportedError
from bake.hooks import steered
from bake.pipeline.thin import check_route
from bake.plan.plan import make_plan
from bake.strength.coefficients import LayerPush, Push

HIDDEN, LAYERS, PUSHED = 32, 4, (1, 2)
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
SHARING = ("sliding", "sliding", "full", "sliding", "full", "sliding", "sliding", "full")
# What the slot is, and what a configuration needs beyond the sizes.
FAMILIES = {
    "llama": ("self_attn.o_proj.bias", {}),
    "qwen3": ("self_attn.o_proj.bias", {"head_dim": 8}),
    "gemma": ("self_attn.o_proj.bias", {"head_dim": 8}),
    "gemma2": ("self_attn.o_proj.bias", {"head_dim": 8, **MIXED}),
    "gemma3_text": ("self_attn.o_proj.bias", {"head_dim": 8, **MIXED}),
    # Its last three layers take keys and values from two before, and it has inputs of each layer.
    "gemma4_text": (
        "post_attention_layernorm.weight",
        {
            **{"num_hidden_layers": 8, "num_kv_shared_layers": 3, "use_double_wide_mlp": True},
            "layer_types": [f"{kind}_attention" for kind in SHARING],
            **{"sliding_window": 5, "head_dim": 8, "global_head_dim": 16},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96},
        },
    ),
    "olmo2": ("post_attention_layernorm.weight", {}),
    "qwen2": (
        "self_attn.o_proj.weight",
        {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 5},
    ),
    "stablelm": ("self_attn.o_proj.weight", {}),
    "mistral": ("mlp.down_proj.weight", {"sliding_window": 5}),
    "phi3": ("mlp.down_proj.weight", {"sliding_window": 5}),
    "mixtral": ("mlp.experts.down_proj", {"num_local_experts": 4, "sliding_window": 5}),
}
SQUARES = ("mistral", "phi3", "mixtral")


@cache
def config_of(family: str):
    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family][1]})


@cache
def route_of(family: str):
    return examine(config_of(family)).choose("auto", route="insert")


def save_base(family: str, directory):
    """Write a random model whose residual stream is as large as a trained one's."""
    model = build_random(config_of(family), 3)
    if family in SQUARES:
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(32)
    model.save_pretrained(directory)
    return model


def push_of(layers=PUSHED, size: float = 1.0) -> Push:
    generator = torch.Generator().manual_seed(9)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
        for layer in layers
    }
    entries = tuple(LayerPush(layer, 1.0, size) for layer in layers)
    return Push("flat", 1.0, (layers[0], layers[-1] + 1), HIDDEN, entries, directions)


def bake_into(family: str, base, target, push: Push, route=None):
    """Write the baked checkpoint as export does; return the plan."""
    checkpoint = open_checkpoint(str(base))
    anatomy = examine(config_of(family))
    plan = make_plan(checkpoint, anatomy, route or route_of(family), push)
    target.mkdir()
    write_weights(checkpoint, plan.edits, target)
    write_config(checkpoint, plan.config_changes, target)
    return plan, anatomy


def greedily(model, ids):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )[:, ids.shape[1] :]


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inserted_layer_does_what_the_hook_does(family, tmp_path):
    base = save_base(family, tmp_path / "base").eval()
    push = push_of(size=4.0)
    plan, anatomy = bake_into(family, tmp_path / "base", tmp_path / "baked", push)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    plain, greedy = logits_of(base, ids), greedily(base, ids)
    with steered(base, anatomy.structure, "mlp_out", push.vectors):
        hooked, wanted = logits_of(base, ids), greedily(base, ids)
    effect = (hooked - plain).abs().max()
    assert effect > 0.01 * plain.std()
    assert not torch.equal(greedy, wanted)

    baked, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "baked", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[kind] for kind in report)
    assert (logits_of(baked.eval(), ids) - hooked).abs().max() < 1e-4 * effect
    assert torch.equal(greedily(baked, ids), wanted)
    assert FAMILIES[family][0] in plan.slot_edits[0].parameter
    assert baked.config.num_hidden_layers == config_of(family).num_hidden_layers + len(PUSHED)


def test_old_layers_keep_their_bytes_and_their_kind(tmp_path):
    save_base("gemma2", tmp_path / "base")
    plan, _ = bake_into("gemma2", tmp_path / "base", tmp_path / "baked", push_of())
    base, baked = open_checkpoint(str(tmp_path / "base")), open_checkpoint(str(tmp_path / "baked"))
    moved = {edit.name: edit.new_name for edit in plan.edits if isinstance(edit, Rename)}
    assert moved["model.layers.3.mlp.down_proj.weight"] == "model.layers.5.mlp.down_proj.weight"
    for name in base.tensors:
        assert baked.read_bytes(moved.get(name, name)) == base.read_bytes(name)
    types = json.loads(baked.config_text)["layer_types"]
    old = json.loads(base.config_text)["layer_types"]
    assert [types[index] for index in (0, 1, 3, 5)] == old


def test_large_zero_matrices_take_no_memory(tmp_path):
    save_base("qwen3", tmp_path / "base")
    route = route_of("qwen3")
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    rewritten = route.rewriter.rewrite(checkpoint, config_of("qwen3"), PUSHED)
    added = {edit.name: edit.tensor for edit in rewritten.edits if not isinstance(edit, Rename)}
    matrix = added["model.layers.2.mlp.down_proj.weight"]
    assert matrix.shape == (HIDDEN, 80)
    assert matrix.untyped_storage().nbytes() == 4


def test_another_dtype_is_written_for_old_and_new_layers_alike(tmp_path):
    save_base("qwen3", tmp_path / "base")
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    anatomy = examine(config_of("qwen3"))
    plan = make_plan(checkpoint, anatomy, route_of("qwen3"), push_of(), dtype="bfloat16")
    (tmp_path / "baked").mkdir()
    write_weights(checkpoint, plan.edits, tmp_path / "baked")
    write_config(checkpoint, plan.config_changes, tmp_path / "baked")
    baked = open_checkpoint(str(tmp_path / "baked"))
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {"F32"}
    assert {entry.dtype for entry in baked.tensors.values()} == {"BF16"}
    moved = baked.read("model.layers.5.mlp.up_proj.weight")
    old = checkpoint.read("model.layers.3.mlp.up_proj.weight")
    assert torch.equal(moved, old.bfloat16())


def test_layers_beyond_the_last_are_left_out(tmp_path):
    """Checkpoints with multi-token prediction carry one more layer, which would become a real one."""
    model = save_base("qwen3", tmp_path / "base")
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(HIDDEN, 2 * HIDDEN)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    plan, _ = bake_into("qwen3", tmp_path / "base", tmp_path / "baked", push_of())
    baked = open_checkpoint(str(tmp_path / "baked"))
    assert Drop("model.layers.4.eh_proj.weight") in plan.edits
    assert not [name for name in baked.tensors if name.endswith("eh_proj.weight")]


def test_a_bias_that_the_base_drops_is_not_brought_to_life(tmp_path):
    model = save_base("qwen3", tmp_path / "base")
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    tensors["model.layers.3.self_attn.o_proj.bias"] = torch.ones(HIDDEN)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.3.*transformers drops on loading"):
        bake_into("qwen3", tmp_path / "base", tmp_path / "baked", push_of())


def test_the_cheapest_layer_that_fits_is_inserted():
    """A mixture of experts with a dense layer gets dense layers, where its config can say so."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        **COMMON,
        head_dim=8,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    insertion = examine(config).choose("auto", route="insert").rewriter
    growth = plan_growth(config, config.to_json_string(), insertion.path, insertion.filling, [2])
    assert growth.changes["mlp_only_layers"] == [0, 3]
    dense = sum(p.numel() for p in growth.model.get_submodule("model.layers.3").parameters())
    sparse = sum(p.numel() for p in growth.model.get_submodule("model.layers.2").parameters())
    assert insertion.layer_parameters == dense < sparse


def test_quantised_layers_are_refused_in_one_line(tmp_path):
    save_base("qwen3", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="float checkpoints only"):
        bake_into("qwen3", tmp_path / "base", tmp_path / "baked", push_of())


def test_a_fused_expert_is_one_slot_for_every_expert(tmp_path):
    save_base("mixtral", tmp_path / "base")
    plan, _ = bake_into("mixtral", tmp_path / "base", tmp_path / "baked", push_of((1,)))
    assert [edit.slot.part for edit in plan.slot_edits] == [0, 1, 2, 3]
    assert len({edit.parameter for edit in plan.slot_edits}) == 1
    assert len({edit.name for edit in plan.slot_edits}) == 4


def test_the_config_grows_in_every_form_that_it_has():
    places = arrange(4, {1: 1, 2: 3})
    assert places == (
        Place(0),
        Place(1),
        Place(1, True),
        Place(2),
        Place(3, True),
        Place(3),
    )
    config = AutoConfig.for_model(
        "qwen2_moe",
        **{**COMMON, "mlp_only_layers": [0, 3], "layer_types": ["full_attention"] * 4},
    )
    config.max_window_layers = 2
    config.no_rope_layers = [1, 0, 1, 0]
    config.eos_token_id = [2, 3, 4, 5]
    changes = grow_config(config, places, config.to_dict())
    assert changes["num_hidden_layers"] == 6
    assert changes["mlp_only_layers"] == [0, 4, 5]
    assert changes["layer_types"] == ["full_attention"] * 6
    assert changes["max_window_layers"] == 3
    assert changes["no_rope_layers"] == [1, 0, 0, 1, 0, 0]
    assert "eos_token_id" not in changes


def test_a_layer_that_follows_from_its_number_is_refused():
    config = AutoConfig.for_model(
        "qwen2_moe", **COMMON, decoder_sparse_step=2, moe_intermediate_size=24, num_experts=4
    )
    places = arrange(4, {0: 0})
    before = build_on_meta(config)
    grown = AutoConfig.for_model(
        "qwen2_moe",
        **{**COMMON, "num_hidden_layers": 5},
        decoder_sparse_step=2,
        moe_intermediate_size=24,
        num_experts=4,
    )
    with pytest.raises(UnsupportedError, match="follows from its number"):
        check_growth(before, build_on_meta(grown), "model.layers", places, "qwen2_moe")


def test_auto_never_inserts_and_inspect_shows_the_cost(make_model, capsys):
    directory = make_model(architecture="mistral")
    anatomy = inspect(str(directory))
    assert "insert" in {route.route for route in anatomy.routes}
    if not any(route.route == "host" for route in anatomy.routes):
        with pytest.raises(UnsupportedError):
            anatomy.choose("auto")
    assert main(["inspect", str(directory)]) == 0
    shown = capsys.readouterr().out
    assert "1/6 of the model's compute" in shown
    assert "only with --route insert" in shown
    assert "config: one more layer for each pushed one" in shown
    assert "auto takes mlp_out, host smollm3" in shown


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory, prompts_file):
    """A bfloat16 Gemma 2, exported with --route insert."""
    base = make_model(TinyModel("gemma2", dtype="bfloat16"))
    folder = tmp_path_factory.mktemp("inserted")
    generator = torch.Generator().manual_seed(4)
    given = Direction({None: torch.randn(HIDDEN, generator=generator)}, "mlp_out", {})
    (folder / "direction.safetensors").write_bytes(direction_bytes(given))
    result = export(
        str(base),
        direction=str(folder / "direction.safetensors"),
        output=str(folder / "out"),
        prompts=str(prompts_file),
        route="insert",
        multiplier=2.0,
    )
    return base, result


def test_a_bfloat16_export_is_proven_and_its_card_tells_the_cost(exported):
    _, result = exported
    assert result.equivalence.passed
    assert result.equivalence.loading_info_clean
    assert result.equivalence.greedy_equal
    assert result.equivalence.representation_error < 0.005
    recorded = json.loads((result.output / "bake.json").read_text())
    assert recorded["added_layers"] == 3
    card = (result.output / "README.md").read_text()
    assert "3 decoder layers were added" in card
    assert "50 %" in card


def test_a_bfloat16_export_reloads_and_continues_as_the_hooked_base(exported):
    base, result = exported
    structure = result.base.anatomy.structure
    hooked = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    baked, report = AutoModelForCausalLM.from_pretrained(
        result.output, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in report)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    plain, alone = logits_of(hooked, ids), greedily(hooked, ids)
    with steered(hooked, structure, "mlp_out", result.push.vectors):
        wanted, continued = logits_of(hooked, ids), greedily(hooked, ids)
    effect = (wanted - plain).abs().max()
    assert not torch.equal(alone, continued)
    assert (logits_of(baked.eval(), ids) - wanted).abs().max() < 5e-3 * effect
    assert torch.equal(greedily(baked, ids), continued)


def test_an_estimate_counts_the_new_layers(exported, capsys):
    base, result = exported
    found = estimate(str(base), route="insert", multiplier=2.0)
    weights = [p for p in result.output.glob("*.safetensors") if p.name.startswith("model")]
    assert sum(entry.bytes for entry in found.files) == sum(p.stat().st_size for p in weights)
    assert sum(p.stat().st_size for p in weights) > 1.2 * found.base_bytes
    assert found.route == "insert"
    assert "3 decoder layers are added to 6" in capsys.readouterr().err


def test_a_thin_bake_cannot_insert(exported):
    route = exported[1].plan.route
    with pytest.raises(UnsupportedError, match="the weights are rewritten"):
        check_route(exported[1].base.anatomy, route)


def test_verify_rebuilds_an_inserted_bake(exported):
    base, result = exported
    assert verify(str(result.output), base=str(base)).equivalence.passed
