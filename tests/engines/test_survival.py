"""Engines: the facts are well formed, a target decides the route, and what is not known is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from bake.anatomy import examine
from bake.anatomy.base import open_base
from bake.api import calibrate, export
from bake.engines.survival import (
    Outline,
    describe_survivals,
    engine_names,
    find_rotation,
    read_facts,
    survival,
    survivals,
    to_values,
)
from bake.errors import UnsupportedError
from bake.options.shared import ENGINES
from bake.pipeline.recipe import make_recipe
from bake.report import describe_anatomy

DOWN, OUT = "model.layers.3.mlp.down_proj.bias", "model.layers.3.self_attn.o_proj.bias"
QUERY = "model.layers.3.self_attn.q_proj.bias"
CHECKED = {"read", "run"}


@cache
def anatomy(model_type):
    return examine(CONFIG_MAPPING[model_type]())


def verdicts(model_type, slots, new_parameters=()):
    found = survivals(Outline(model_type, tuple(slots), tuple(new_parameters)))
    return {entry.engine: entry.verdict for entry in found}


@pytest.mark.parametrize("engine", read_facts())
def test_facts_are_well_formed(engine):
    facts = read_facts()[engine]
    assert facts["name"]
    assert facts["version"]
    assert facts["source"]
    assert facts["checked"] in CHECKED
    assert facts["reads"]
    families = [*facts["reads"], *facts.get("transformers", ()), *facts["absent"]]
    assert len(set(families)) == len(families), "an architecture is listed once"
    assert set(families) <= set(CONFIG_MAPPING), "named as transformers names it"
    for family in facts["reads"].values():
        assert set(family) <= {
            "reads",
            "file",
            "checked",
            "unread",
            "how",
            "broken",
            "loses",
            "only",
            "otherwise",
            "misread",
            "respelled",
            "never",
        }
        assert family["file"]
        assert all(glob.endswith("bias") for glob in family["reads"])
        assert family.get("checked", "read") in CHECKED
        assert family.get("unread", facts["unread"]) in {"dropped", "error"}


def test_command_line_offers_every_engine():
    assert engine_names() == ENGINES


def test_llama_survives_everywhere_but_for_the_mlp_biases_in_sglang():
    kept = dict.fromkeys(verdicts("llama", [OUT]), "kept")
    assert {*kept} == {*ENGINES} - {"ollama", "lm-studio"}
    assert verdicts("llama", [OUT]) == kept
    assert verdicts("llama", [DOWN]) == {**kept, "sglang": "dropped"}


def test_names_on_disk_and_in_the_model_are_the_same_slot():
    assert survival("vllm", "gpt2", ["h.0.mlp.c_proj.bias"]).verdict == "kept"
    assert survival("vllm", "gpt2", ["transformer.h.11.mlp.c_proj.bias"]).verdict == "kept"
    assert survival("vllm", "qwen2", ["model.layers.1.mlp.q_proj.bias"]).verdict == "dropped"


def test_a_star_does_not_reach_into_another_module():
    shared = "model.layers.3.mlp.shared_experts.down_proj.bias"
    assert survival("vllm", "llama", [shared]).verdict == "dropped"


def test_zero_biases_that_are_dropped_do_no_harm():
    pushed, created = [QUERY], [QUERY, OUT]
    assert survival("llama.cpp", "qwen3", pushed).verdict == "kept"
    found = verdicts("qwen3", pushed, created)
    assert found["vllm"] == "kept"
    # llama.cpp would stumble over them, so that they are left out of the file.
    kept = survival("llama.cpp", "qwen3", pushed, created)
    assert (kept.verdict, "bake gguf leaves out" in kept.reason) == ("kept", True)
    assert survival("llama.cpp", "qwen3", [OUT], created).verdict == "error"
    assert survival("mlx", "qwen3", pushed, created).verdict == "error"
    assert verdicts("qwen3", [OUT], created)["vllm"] == "dropped"


def test_what_runs_anothers_code_has_its_facts_and_is_not_listed():
    assert "ollama" not in verdicts("llama", [DOWN])
    for engine in ("ollama", "lm-studio"):
        found = survival(engine, "llama", [DOWN])
        assert (found.verdict, found.version) == (
            "kept",
            f"on {read_facts()['llama.cpp']['version']}",
        )
        assert anatomy("qwen3").choose("auto", target=engine).site == "attn_in"


def test_a_setting_that_an_engine_does_not_compute_is_another_model():
    """Gemma as Granite: its GELU is told by the config, and engines take a Granite's to be SiLU."""
    found = examine(CONFIG_MAPPING["gemma"](num_hidden_layers=4))
    route = found.choose("mlp_out")
    assert route.rewriter.name == "granite"
    told = {entry.engine: entry for entry in found.survivals(route)}
    assert {engine: told[engine].verdict for engine in ("vllm", "llama.cpp", "mlx")} == {
        "vllm": "error",
        "llama.cpp": "dropped",
        "mlx": "dropped",
    }
    assert "whatever hidden_act says, and it is gelu" in told["llama.cpp"].reason
    assert verdicts("granite", [DOWN])["llama.cpp"] == "kept"
    with pytest.raises(UnsupportedError, match="mlp_out is dropped"):
        found.choose("mlp_out", target="ollama")


def test_one_slot_of_several_that_is_dropped_is_a_loss():
    assert survival("vllm", "qwen3", [QUERY, OUT]).verdict == "dropped"


def test_an_architecture_may_differ_from_its_engine():
    extra = ["transformer.h.0.extra.bias"]
    assert survival("sglang", "gpt2", extra).verdict == "error"
    assert survival("sglang", "olmo", extra).verdict == "dropped"
    warned = survival("sglang", "arcee", [DOWN])
    assert warned.reason.endswith(", told by a warning")
    assert survival("llama.cpp", "qwen2", [QUERY]).seen == "run: qwen2.cpp"
    assert survival("llama.cpp", "llama", [QUERY]).seen == "run: llama.cpp"


def test_an_engine_that_runs_transformers_own_module_reads_everything():
    assert survival("vllm", "cwm", [DOWN]).verdict == "kept"


def test_an_engine_without_the_architecture_cannot_load_it():
    found = survival("mlx", "cwm", [DOWN])
    assert (found.verdict, found.reason) == ("error", "MLX-lm has no code for cwm")
    assert survival("mlx", "olmo", [OUT]).reason.startswith("its OLMo is for")


def test_a_stock_weight_is_read_wherever_the_architecture_is():
    assert survival("mlx", "qwen3", ["model.layers.3.mlp.down_proj.weight"]).verdict == "kept"


def test_what_was_not_checked_is_unknown_and_transformers_is_proven():
    assert verdicts("zamba2", [DOWN]) == {
        **dict.fromkeys({*ENGINES} - {"ollama", "lm-studio"}, "unknown"),
        "transformers": "kept",
    }
    assert survival("vllm", "zamba2", [DOWN]).seen == "not checked"
    assert verdicts("afmoe", [OUT])["transformers"] == "kept"


@pytest.mark.parametrize(
    ("model_type", "target", "site"),
    [
        ("llama", "transformers", "mlp_out"),
        ("llama", "vllm", "mlp_out"),
        ("llama", "llama.cpp", "mlp_out"),
        ("llama", "mlx", "mlp_out"),
        ("llama", "sglang", "attn_out"),
        ("qwen3", "transformers", "attn_out"),
        ("qwen3", "sglang", "attn_out"),
        ("qwen3", "vllm", "attn_in"),
        ("qwen3", "llama.cpp", "attn_in"),
        ("gemma3_text", "ollama", "attn_in"),
        ("gpt2", "vllm", "mlp_out"),
        ("gpt2", "llama.cpp", "mlp_out"),
        ("gpt2", "mlx", "mlp_out"),
    ],
)
def test_auto_takes_the_first_route_that_survives_in_the_target(model_type, target, site):
    assert anatomy(model_type).choose("auto", target=target).site == site


def test_refused_target_says_why_what_survives_there_and_where_this_survives():
    with pytest.raises(UnsupportedError) as refused:
        anatomy("llama").choose("mlp_out", target="sglang")
    text = str(refused.value)
    assert "llama cannot be baked for SGLang" in text
    assert "mlp_out is dropped (no slot for mlp.down_proj.bias, ignored without a warning)" in text
    assert "--site attn_out, --site attn_in" in text
    assert "mlp_out survives in transformers, vLLM, llama.cpp, MLX-lm" in text
    assert "\n" not in text


def test_target_in_which_no_route_survives_is_refused():
    with pytest.raises(UnsupportedError, match=r"attn_out does not load .*no route that is known"):
        anatomy("qwen3").choose("auto", target="mlx")


def test_a_target_of_which_nothing_is_known_is_refused_with_what_is():
    unchecked = replace(anatomy("llama"), model_type="zamba2")
    with pytest.raises(UnsupportedError, match=r"not known .* was not checked.*; checked .*llama,"):
        unchecked.choose("auto", target="llama.cpp")
    assert unchecked.choose("auto", target="transformers").site == "mlp_out"


def test_a_direction_restricts_the_sites_before_the_target_does():
    with pytest.raises(UnsupportedError, match="attn_out is dropped"):
        anatomy("qwen3").choose("auto", found_at="mlp_out", target="vllm")


def test_unknown_target_is_refused_before_any_work():
    with pytest.raises(UnsupportedError, match=r"unknown target 'tgi'; the engines are transf"):
        anatomy("llama").choose("auto", target="tgi")
    recipe = make_recipe({"model": "m", "output": "o", "pairs": "p", "target": "tgi"})
    with pytest.raises(UnsupportedError, match="unknown target 'tgi'"):
        recipe.check()


def test_a_rewritten_base_is_judged_by_the_architecture_that_it_becomes():
    found = anatomy("qwen3")
    route = replace(
        found.routes[0],
        site="mlp_out",
        rewriter=SimpleNamespace(name="more", describe=str),
        rewritten=None,
    )
    silent = replace(found, routes=(route,))
    with pytest.raises(UnsupportedError, match=r"not known .*only when it is planned"):
        silent.choose("mlp_out", target="vllm")
    assert silent.choose("mlp_out", target="transformers") is route
    with pytest.raises(UnsupportedError, match="does not load"):
        found.choose("mlp_out", target="vllm")  # Qwen 3's own host
    host = replace(route, rewritten=Outline("llama", ("mlp.down_proj.bias",)))
    in_place = [entry for entry in found.routes if entry.rewriter is None]
    told = replace(found, routes=(*in_place, host))
    assert told.choose("auto", target="mlx") is host
    with pytest.raises(UnsupportedError, match="is dropped"):
        told.choose("mlp_out", target="sglang")


def test_announcement_is_one_line_with_versions_and_reasons():
    found = survivals(Outline("qwen3", (OUT,)))
    text = describe_survivals(found)
    assert text.startswith("survives in transformers ")
    facts = read_facts()
    assert (
        f"SGLang {facts['sglang']['version']}; dropped by vLLM {facts['vllm']['version']}" in text
    )
    assert "does not load in llama.cpp" in text
    assert "\n" not in text
    assert describe_survivals(found, brief=True) == (
        "survives in transformers, SGLang; dropped by vLLM; does not load in llama.cpp, MLX-lm"
    )
    unknown = survivals(Outline("zamba2", (OUT,)))
    assert describe_survivals(unknown, brief=True).endswith(
        "unknown in vLLM, SGLang, llama.cpp, MLX-lm"
    )


def test_inspect_says_it_of_every_route():
    found = anatomy("llama")
    text = describe_anatomy(found)
    assert text.count("survives in transformers") == len(found.routes)
    values = json.loads(json.dumps(found.to_dict()))
    assert [route["survives"]["sglang"]["verdict"] for route in values["routes"]] == [
        "dropped",
        "kept",
        "kept",
        "dropped",
    ]


def test_inspect_says_first_what_auto_takes():
    found = examine(CONFIG_MAPPING["qwen2"](num_hidden_layers=2))
    assert "auto takes mlp_out, host llama" in describe_anatomy(found).splitlines()[1]
    assert found.to_dict()["auto"] == {"site": "mlp_out", "route": "host"}
    none = examine(CONFIG_MAPPING["mixtral"](num_hidden_layers=2, sliding_window=8))
    assert none.automatic is None
    assert "auto takes nothing" in describe_anatomy(none)


def test_export_takes_the_route_of_the_target_and_records_where_it_survives(
    tmp_path, llama, prompts_file, capsys
):
    direction = tmp_path / "direction.safetensors"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    save_file({"direction": vector}, direction, metadata={"site": "mlp_out"})
    norms = tmp_path / "norms.json"
    calibrate(str(llama), output=norms, prompts=prompts_file, site="attn_out")
    output = tmp_path / "baked"
    options = {"direction": direction, "calibration": norms, "thin": True}
    export(str(llama), output=output, target="sglang", **options)
    recorded = json.loads((output / "bake.json").read_text())
    assert recorded["site"] == "attn_out"
    pushed = ("self_attn.o_proj.bias",)
    assert recorded["survives"] == to_values(survivals(Outline("llama", pushed)))
    assert recorded["survives"]["sglang"]["verdict"] == "kept"
    assert "survives in transformers" in capsys.readouterr().err
    assert "| SGLang 0" in (output / "README.md").read_text()


def test_added_layers_are_not_promised_to_an_engine():
    with pytest.raises(UnsupportedError, match="whether added layers survive in mlx is not known"):
        anatomy("llama").choose("mlp_out", route="insert", target="mlx")
    assert anatomy("llama").choose("mlp_out", route="insert", target="transformers").rewriter


def test_an_engine_that_loses_the_window_of_a_host_is_no_target():
    """MLX loads no SmolLM 3 in which every layer slides, which is what such a Mistral becomes."""
    config = CONFIG_MAPPING["mistral"](num_hidden_layers=4, sliding_window=4096)
    found = examine(config)
    route = found.choose("mlp_out")
    assert route.rewriter.name == "smollm3"
    told = {entry.engine: entry for entry in found.survivals(route)}
    assert told["mlx"].verdict == "error"
    assert "every entry of layer_types is sliding_attention" in told["mlx"].reason
    assert told["vllm"].verdict == "kept"
    with pytest.raises(UnsupportedError, match="every entry of layer_types"):
        found.choose("auto", target="mlx")
    # A SmolLM 3 that is the base itself is not re-expressed, so nothing is lost by the bake.
    assert verdicts("smollm3", [DOWN])["mlx"] == "kept"


def test_a_base_in_a_spelling_that_an_engine_does_not_read_is_not_promised(tmp_path, llama):
    """MLX reads rope_theta; what transformers 5 saves has rope_parameters instead."""
    usual = {"rope_type": "default", "rope_theta": 10000.0}
    assert survival("mlx", "llama", [DOWN], rotation=usual).verdict == "kept"
    found = survival("mlx", "llama", [DOWN], rotation={**usual, "rope_theta": 5e5})
    assert (found.verdict, "reads rope_theta" in found.reason) == ("unknown", True)
    assert survival("mlx", "granite", [DOWN], rotation=usual).verdict == "error"
    assert survival("mlx", "starcoder2", ["mlp.c_proj.bias"], rotation=usual).verdict == "dropped"
    assert (
        survival("vllm", "llama", [DOWN], rotation={**usual, "rope_theta": 5e5}).verdict == "kept"
    )
    values = {"rope_parameters": usual}
    assert find_rotation(values) == usual
    assert find_rotation({"text_config": values}) == usual
    assert find_rotation({**values, "rope_theta": 10000.0}) is None
    assert find_rotation({"rope_theta": 10000.0}) is None
    respelled = open_base(str(llama))
    assert respelled.anatomy.rotation is not None
    route = respelled.anatomy.choose("mlp_out")
    assert route.outline("llama", respelled.anatomy.rotation).rotation


def test_rotary_positions_that_a_host_needs_are_looked_at():
    """llama.cpp's converter writes no factors for a Llama's longrope: it would be another model."""
    glm = anatomy("glm")
    route = glm.choose("mlp_out", host="llama")
    told = {entry.engine: entry for entry in glm.survivals(route)}
    assert (told["llama.cpp"].verdict, told["vllm"].verdict) == ("dropped", "kept")
    assert "rope_parameters.rope_type" in told["llama.cpp"].reason
    assert {
        entry.engine: entry
        for entry in anatomy("qwen2").survivals(anatomy("qwen2").choose("mlp_out"))
    }["llama.cpp"].verdict == "kept"


def test_biases_that_are_taken_for_something_else_are_lost():
    found = survival("llama.cpp", "olmo", [QUERY])
    assert (found.verdict, "takes self_attn.q_proj.bias for something else" in found.reason) == (
        "dropped",
        True,
    )
    assert survival("llama.cpp", "olmo", [OUT]).verdict == "error"
