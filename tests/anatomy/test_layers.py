"""Layers that differ: kinds, the twin that holds each of them, and routes that cover some layers only."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING

from bake.anatomy import examine
from bake.anatomy.catalogue import default_config, examine_all, examine_model_type
from bake.anatomy.layers import LayerMap, choose_layers_to_keep, find_layer_kinds, layers_by_kind
from bake.anatomy.shrink import shrink
from bake.anatomy.structure import combine, find_decoder_layers
from bake.anatomy.twin import Twin
from bake.checkpoint.loading import build_on_meta
from bake.errors import BakeError, UnsupportedError
from bake.hooks import captured, steered
from bake.pipeline.recipe import make_recipe
from bake.plan.destination import choose_layers
from bake.sites import LayerStructure, Slot, layers_with
from bake.support.text import list_numbers

OPTIONS = {
    # Every fourth layer attends to everything, the others are linear attention.
    "qwen3_next": {"num_hidden_layers": 8},
    "bamba": {"num_hidden_layers": 5, "attn_layer_indices": [1, 3]},
    "deepseek_v2": {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
}


def config_of(model_type):
    return CONFIG_MAPPING[model_type](**OPTIONS.get(model_type, {}))


@cache
def anatomy(model_type):
    return examine(config_of(model_type))


def route(model_type, site):
    return next(route for route in anatomy(model_type).routes if route.site == site)


def short_slots(found):
    """{names of the slots inside the layer: the layers that have them}."""
    table = {}
    for layer in found.layers:
        names = " ".join(slot.bias.partition(f".{layer}.")[2] for slot in found.slots_of(layer))
        table.setdefault(names, []).append(layer)
    return table


# --- hybrids ------------------------------------------------------------------------------------


def test_hybrid_takes_a_push_in_the_layers_that_have_the_slot():
    found = route("qwen3_next", "attn_out")
    assert found.layers == (3, 7)
    assert short_slots(found) == {"self_attn.o_proj.bias": [3, 7]}
    assert found.twin.passed
    assert set(found.slots) == {3, 7}


def test_parts_of_a_hybrids_layers_have_their_own_names():
    structure = anatomy("qwen3_next").structure
    assert [structure.at(layer).attention for layer in range(4)] == [
        "linear_attn",
        "linear_attn",
        "linear_attn",
        "self_attn",
    ]


def test_slots_differ_between_kinds_of_layers():
    assert short_slots(route("bamba", "attn_out")) == {
        "mamba.out_proj.bias": [0, 2, 4],
        "self_attn.o_proj.bias": [1, 3],
    }
    assert sorted(route("bamba", "attn_out").flags) == ["attention_bias", "mamba_proj_bias"]


def test_slots_of_dense_and_sparse_layers():
    assert short_slots(route("deepseek_v2", "mlp_out")) == {
        "mlp.down_proj.bias": [0],
        "mlp.shared_experts.down_proj.bias": [1, 2, 3],
    }
    assert route("deepseek_v2", "mlp_in").layers == (0,)


def test_new_parameters_are_those_of_all_layers():
    """The flag creates biases in every full-attention layer; what no push goes to is zero."""
    created = route("qwen3_next", "attn_out").new_parameters
    assert {name.split(".")[2] for name in created} == {"3", "7"}
    assert len(created) == 2 * 4


# --- kinds --------------------------------------------------------------------------------------


def kinds_of(config):
    model = build_on_meta(config)
    return find_layer_kinds(model, find_decoder_layers(model)[0], config)


def test_kinds_follow_modules_parameters_and_lists_of_the_config():
    assert [len(v) for v in layers_by_kind(kinds_of(config_of("qwen3_next"))).values()] == [6, 2]
    assert list(layers_by_kind(kinds_of(config_of("deepseek_v2"))).values()) == [[1, 2, 3], [0]]
    assert len(set(kinds_of(CONFIG_MAPPING["llama"](num_hidden_layers=5)))) == 1
    # Gemma 2's layers differ in nothing but their window.
    assert len(set(kinds_of(CONFIG_MAPPING["gemma2"](num_hidden_layers=4)))) == 2


def test_kind_is_the_same_in_any_size():
    config = config_of("qwen3_next")
    small = shrink(config, [0, 1, 3])
    assert small.hidden_size < config.hidden_size
    assert set(kinds_of(small)) == set(kinds_of(config))
    assert set(kinds_of(shrink(config))) < set(
        kinds_of(config)
    )  # Its first three layers are alike.


@pytest.mark.parametrize(
    ("kinds", "first_choice"),
    [
        ("aaaaaa", [0, 1, 2]),
        ("aaabaaab", [0, 1, 3]),
        ("abcd", [0, 1, 2, 3]),
        ("aa", [0, 1]),
    ],
)
def test_layers_to_keep_hold_every_kind(kinds, first_choice):
    choices = choose_layers_to_keep(kinds)
    assert choices[0] == first_choice
    for choice in choices:
        assert {kinds[layer] for layer in choice} == set(kinds)
        assert choice == sorted(choice)


def test_layers_to_keep_of_a_period_are_the_first_as_they_are():
    assert [0, 1, 2, 3] in choose_layers_to_keep("aaabaaab")
    assert [0, 1, 3, 7] in choose_layers_to_keep("aaabaaab")
    assert choose_layers_to_keep([str(layer) for layer in range(40)]) == []


def test_layer_map_matches_by_kind():
    found = LayerMap(tuple("aababc"), tuple("aab"))
    assert found.kinds == ["a", "b"]
    assert (found.real_layers("a"), found.twin_layers("a")) == ([0, 1, 3], [0, 1])
    assert found.strangers == [5]
    assert found.probed_layer("a") == 1


def test_layer_of_a_kind_that_the_twin_lacks_is_not_covered(monkeypatch, examined_anew):
    """What the twin cannot show is not claimed, even where the names would fit."""
    from bake.anatomy import examination as module

    monkeypatch.setattr(module, "choose_layers_to_keep", lambda _kinds: [[0, 1, 2]])
    found = examine(config_of("deepseek_v2"))
    assert found.choose("mlp_out").layers == (0, 1, 2, 3)
    monkeypatch.setattr(module, "choose_layers_to_keep", lambda _kinds: [[1, 2, 3]])
    module.forget_examinations()
    found = examine(config_of("deepseek_v2"))
    assert found.choose("mlp_out").layers == (1, 2, 3)


def test_too_many_kinds_are_refused(monkeypatch, examined_anew):
    from bake.anatomy import examination as module

    monkeypatch.setattr(module, "choose_layers_to_keep", lambda _kinds: [])
    with pytest.raises(UnsupportedError, match="4 layers are of 2 kinds, too many"):
        examine(config_of("deepseek_v2"))


# --- shrinking ----------------------------------------------------------------------------------


def test_shrunk_lists_follow_the_layers_that_are_kept():
    small = shrink(config_of("bamba"), [0, 1, 4])
    assert small.attn_layer_indices == [1]
    assert shrink(config_of("deepseek_v2"), [0, 2, 3]).first_k_dense_replace == 1
    assert shrink(config_of("deepseek_v2"), [1, 2, 3]).first_k_dense_replace == 0


def test_shrunk_longrope_has_a_factor_for_each_pair_of_its_own_dimensions():
    pairs = 96 // 2
    config = CONFIG_MAPPING["phi3"](
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * pairs,
            "long_factor": [2.0] * pairs,
        },
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
    )
    small = shrink(config)
    assert len(small.rope_parameters["short_factor"]) == small.hidden_size // 4 // 2
    assert torch.isfinite(Twin(config).logits).all()


def test_a_list_as_long_as_the_layers_by_chance_is_not_cut():
    """Falcon-H1 has five multipliers whatever its depth; Reformer's default list names a kind a layer."""
    small = shrink(CONFIG_MAPPING["falcon_h1"](num_hidden_layers=5))
    assert small.num_hidden_layers < 5
    assert len(small.ssm_multipliers) == 5
    small = shrink(CONFIG_MAPPING["reformer"]())
    assert len(small.attn_layers) == small.num_hidden_layers < 6


def test_a_twin_turns_a_small_part_of_its_head_by_yarn():
    """As DeepSeek-V4's published config does; an eighth of a twin's head would be less than a pair."""
    scaling = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}
    twin = Twin(CONFIG_MAPPING["deepseek_v4"](rope_scaling=scaling))
    assert twin.config.rope_parameters["compress"]["rope_type"] == "yarn"
    assert torch.isfinite(twin.logits).all()


def test_shrunk_config_keeps_how_many_experts_are_chosen():
    assert shrink(CONFIG_MAPPING["mixtral"]()).num_experts_per_tok == 2
    assert shrink(CONFIG_MAPPING["mixtral"](num_experts_per_tok=1)).num_experts_per_tok == 1


# --- hooks and captures, layer by layer ---------------------------------------------------------


def test_hook_and_capture_follow_each_layers_names():
    twin = Twin(config_of("bamba"), keep=[0, 1, 2])
    linear = LayerStructure("model.layers", "mamba", "feed_forward", "pre_ff_layernorm")
    full = replace(linear, attention="self_attn")
    structure = combine({0: linear, 1: full, 2: linear})
    assert structure.at(1).attention == "self_attn"
    push = {layer: torch.ones(twin.hidden_size) for layer in (0, 1)}
    seen = {}

    def keep(layer, activation):
        seen[layer] = activation

    with captured(twin.model, structure, "attn_out", [0, 1], keep):
        twin.run(twin.model)
        base = dict(seen)
        twin.run(twin.model, steered(twin.model, structure, "attn_out", {0: push[0]}))
    torch.testing.assert_close(seen[0] - base[0], torch.ones_like(base[0]))
    with captured(twin.model, structure, "attn_out", [1], keep):
        twin.run(twin.model, steered(twin.model, structure, "attn_out", {1: push[1]}))
    torch.testing.assert_close(seen[1] - base[1], torch.ones_like(base[1]))


def test_layers_with_a_site():
    bare = LayerStructure("model.layers", None, None, None)
    structure = combine({0: bare, 1: replace(bare, attention="self_attn"), 2: bare})
    assert layers_with("attn_in", structure, range(3)) == [1]
    assert layers_with("mlp_out", structure, range(3)) == [0, 1, 2]
    with pytest.raises(UnsupportedError, match="unknown site"):
        layers_with("resid", structure, range(3))


# --- the band and a route that covers some layers -----------------------------------------------


def recipe(**options):
    return make_recipe({"model": "m", "direction": "d", "output": "o", **options})


def test_band_is_the_layers_that_can_take_the_push(capsys):
    found = anatomy("qwen3_next")
    layers, explicit = choose_layers(
        found, recipe(band="0:100").place, route("qwen3_next", "attn_out")
    )
    assert (list(layers), explicit) == ([3, 7], None)
    said = capsys.readouterr().err
    assert "attn_out is exact in layers 3, 7 of the band" in said
    assert "layers 0-2, 4-6 cannot take a push there" in said


def test_band_without_such_a_layer_is_refused():
    with pytest.raises(UnsupportedError, match=r"no layer of the band \(4-6\).*that can: 3, 7"):
        choose_layers(
            anatomy("qwen3_next"), recipe(band="50:87.5").place, route("qwen3_next", "attn_out")
        )


def test_coefficient_of_a_layer_that_cannot_is_refused():
    found, given = anatomy("qwen3_next"), route("qwen3_next", "attn_out")
    layers, explicit = choose_layers(found, recipe(coefficients="3=0.5,7=1").place, given)
    assert (layers, explicit) == ([3, 7], {3: 0.5, 7: 1.0})
    with pytest.raises(UnsupportedError, match=r"layer 4 is named, which cannot .*: 3, 7"):
        choose_layers(found, recipe(coefficients="3=0.5,4=1").place, given)
    with pytest.raises(BakeError, match="layer 9 is named; the model has layers 0 to 7"):
        choose_layers(found, recipe(coefficients="9=1").place, given)


def test_band_of_a_uniform_model_is_said_nothing_about(capsys):
    found = anatomy("llama")
    layers, _ = choose_layers(found, recipe().place, found.choose("mlp_out"))
    assert list(layers) == list(range(12, 28))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([4, 5], "4, 5"), ([7, 0, 1, 2, 9, 8], "0-2, 7-9"), ([1, 3], "1, 3")],
)
def test_numbers_are_listed_as_runs(numbers, text):
    assert list_numbers(numbers) == text


# --- slots of other shapes ----------------------------------------------------------------------


def test_slot_behind_a_vector_is_divided_by_it():
    push, scale = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, 4.0, 0.5])
    delta = Slot("bias", "scale").delta(push, scale)
    torch.testing.assert_close(delta, torch.tensor([0.5, 0.5, -6.0], dtype=torch.float64))


def test_channelwise_scale_is_found_beside_the_bias():
    found = examine(CONFIG_MAPPING["zaya"](num_hidden_layers=3)).choose("mlp_out")
    (slot,) = found.slots_of(1)
    assert slot.bias.endswith("layers.1.post_mlp_residual_scale.hidden_states_bias")
    assert slot.weight == slot.bias.replace("_bias", "_scale")
    assert found.twin.effect > 0.1


def test_flags_that_are_valid_only_together():
    found = examine(CONFIG_MAPPING["internlm3"](num_hidden_layers=3)).choose("mlp_out")
    assert dict(found.flags) == {"attention_bias": True, "mlp_bias": True}


def test_flag_that_creates_nothing_is_named():
    found = examine(CONFIG_MAPPING["dots3_note_text"]())
    assert "set, mlp_bias creates nothing" in found.refusals["mlp_out"]


def test_decoder_of_an_encoder_family_is_written_behind_its_norm():
    found = examine(default_config("bert"))
    assert found.config.is_decoder
    (slot,) = found.choose("mlp_out").slots_of(0)
    assert slot.bias.endswith("layer.0.output.LayerNorm.bias")
    assert found.structure.attention_input == "attention.self"


# --- the catalogue ------------------------------------------------------------------------------


def test_entries_of_one_architecture():
    entries = {entry.site: entry for entry in examine_model_type("bloom")}
    (found,) = entries["mlp_out"].routes
    assert (found.route, found.slots, found.layers) == (
        "native",
        ("mlp.dense_4h_to_h.bias",),
        "2 of 2",
    )
    assert entries["mlp_out"].to_dict()["routes"][0]["kind"] == "write"
    assert entries["mlp_out"].refusal is None


def test_architecture_that_cannot_be_built_is_an_entry_too():
    entries = examine_model_type("musicgen")
    assert [entry.routes for entry in entries] == [()] * 5
    assert all("no small twin" in entry.refusal for entry in entries)
    assert "invalid" in examine_model_type("gemma4_assistant")[0].refusal


def test_architecture_that_takes_too_long_is_refused():
    (entries,) = examine_all(["bloom"], processes=1, time_limit=0.01)
    assert {entry.refusal for entry in entries} == {"bloom: not examined within 0.01 seconds"}


def test_pool_gives_what_a_direct_examination_gives():
    assert list(examine_all(["bloom"], processes=1)) == [examine_model_type("bloom")]
