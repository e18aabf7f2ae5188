"""All architectures of the installed transformers: minutes, so run by `make test-architectures` only.

The catalogue is computed once and compared with its golden file and with the survey that preceded it;
then a small checkpoint of every architecture is planned, written and reloaded by its first route.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from golden import read_golden, rows_of, shorten
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bake.anatomy import examine
from bake.anatomy.catalogue import ABLATION, default_config, examine_all, list_model_types
from bake.anatomy.layers import choose_layers_to_keep, find_layer_kinds
from bake.anatomy.shrink import shrink
from bake.anatomy.structure import find_decoder_layers
from bake.anatomy.tables import COMPLETIONS
from bake.anatomy.twin import build_random
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.loading import build_on_meta, load_report
from bake.checkpoint.writer import write_config, write_weights
from bake.errors import UnsupportedError
from bake.hooks import steered
from bake.models.padding import CAUSE
from bake.plan.plan import make_plan
from bake.sites import SITES
from bake.strength.coefficients import LayerPush, Push

pytestmark = [
    pytest.mark.architectures,
    # Of 190 architectures, none of whose warnings is bake's.
    pytest.mark.filterwarnings("ignore"),
]
SURVEY = Path(__file__).parents[1] / "data" / "survey.csv"
WITH_MLP_OUT = 84
SHARE_OF_CELLS = 0.95

# Behind a post-norm what attention's output bias adds is normalised before it reaches the residual
# stream. The survey measured attention's output itself; as a site of the stream it must be refused.
NORMALISED = "normalises it first"
# Cells that the survey counts and bake refuses: a part of the refusal, and where it holds.
TOGETHER = "added together with the MLP's (a parallel block), where mlp_out is the site"
ONE_BLOCK = "the layer has one block only, whose write is at mlp_out"
WIDER = "nothing in the layer reads their sum"
REFUSED = {
    ("codegen", "attn_out"): TOGETHER,
    ("cohere", "attn_out"): TOGETHER,
    ("cohere2", "attn_out"): TOGETHER,
    ("cohere2_moe", "attn_out"): TOGETHER,
    ("cohere_compass_text", "attn_out"): TOGETHER,
    ("falcon", "attn_out"): TOGETHER,
    ("gpt_neox", "attn_out"): TOGETHER,
    ("gptj", "attn_out"): TOGETHER,
    ("phi", "attn_out"): TOGETHER,
    ("falcon_mamba", "attn_out"): ONE_BLOCK,
    ("mamba", "attn_out"): ONE_BLOCK,
    ("mamba2", "attn_out"): ONE_BLOCK,
    ("nemotron_h", "attn_out"): ONE_BLOCK,
    ("zamba", "attn_out"): ONE_BLOCK,
    ("zamba2", "attn_out"): ONE_BLOCK,
    # Hyper-connections carry several streams; zaya scales each channel of the sum.
    ("hy_v4", "attn_out"): WIDER,
    ("qwen4_exp", "attn_out"): WIDER,
    ("qwen4_exp_text", "attn_out"): WIDER,
    ("zaya", "attn_out"): WIDER,
    # The survey's site was the MLP's own output, which is no residual stream.
    ("xlm", "mlp_out"): "keeps the parts of its layers in separate lists",
}


@pytest.fixture(scope="module")
def entries():
    return {(entry.model_type, entry.site): entry for found in examine_all() for entry in found}


def survey():
    """{(model type with its variant, site): status} of the cells that the survey found exact."""
    with SURVEY.open(encoding="utf-8", newline="") as file:
        return {
            (row["model_type"], site): row[site]
            for row in csv.DictReader(file)
            for site in SITES
            if row[site] != "none"
        }


def in_place(entry):
    """The routes in the architecture itself; those that rewrite it have tests of their own."""
    return [route for route in entry.routes if route.route in ("native", "flag")]


def test_every_architecture_and_site_is_judged(entries):
    assert list(entries) == [
        (name, site) for name in list_model_types() for site in (*SITES, ABLATION)
    ]
    assert all(bool(entry.routes) != bool(entry.refusal) for entry in entries.values())


def test_nothing_crashed_or_hung(entries):
    reasons = [entry.refusal for entry in entries.values() if entry.refusal]
    assert not [reason for reason in reasons if "not examined within" in reason]
    assert not [reason for reason in reasons if "its process ended" in reason]
    assert all("\n" not in reason for reason in reasons)


def test_golden_file(entries):
    """On purpose exact: a difference is a change of behaviour, or `make architectures`."""
    found, golden = rows_of(entries.values()), read_golden()
    assert [row for row in found if row not in golden] == []
    assert [row for row in golden if row not in found] == []


def test_reach_of_mlp_out(entries):
    reached = [
        name for (name, site), entry in entries.items() if site == "mlp_out" and in_place(entry)
    ]
    assert len(reached) >= WITH_MLP_OUT


def test_cells_of_the_survey(entries):
    cells = [cell for cell in survey() if "@" not in cell[0]]
    refused = {cell: str(entries[cell].refusal) for cell in cells if not in_place(entries[cell])}
    post_norm = {cell for cell, why in refused.items() if NORMALISED in why}
    assert {site for _, site in post_norm} == {"attn_out"}
    assert {"gemma2", "gemma3_text", "olmo2", "olmo3"} <= {name for name, _ in post_norm}
    # The survey ran its texts unpadded.
    leaking = {cell for cell, why in refused.items() if CAUSE in why}
    assert {site for _, site in leaking} == {"attn_in"}
    assert {"bamba", "jamba", "mamba2", "zamba2"} <= {name for name, _ in leaking}
    rightly = post_norm | leaking
    unexpected = {
        cell: why
        for cell, why in refused.items()
        if cell not in rightly and REFUSED.get(cell, "?") not in why
    }
    assert unexpected == {}
    missed = len(refused) - len(rightly)
    assert 1 - missed / (len(cells) - len(rightly)) >= SHARE_OF_CELLS


def test_exact_everywhere_where_the_survey_was(entries):
    """A route of a uniform architecture covers all of its layers."""
    for cell, status in survey().items():
        if "@" in cell[0] or "partly" in status or not in_place(entries[cell]):
            continue
        counts = [route.layers.split(" of ") for route in in_place(entries[cell])]
        assert any(covered == total for covered, total in counts), cell


def variant_config(name):
    model_type, _, options = name.partition("@")
    values = {"True": True, "False": False, "None": None}
    given = dict(option.split("=") for option in options.split(","))
    options = {
        key: values[value] if value in values else float(value) for key, value in given.items()
    }
    return CONFIG_MAPPING[model_type](**{**COMPLETIONS.get(model_type, {}), **options})


@pytest.mark.parametrize("name", sorted({name for name, _ in survey() if "@" in name}))
def test_variants_of_the_survey(name):
    anatomy = examine(variant_config(name))
    found = {route.site for route in anatomy.routes}
    for site in [site for variant, site in survey() if variant == name]:
        if site not in found:
            why = anatomy.refusals[site]
            assert site == "attn_out", why
            assert any(reason in why for reason in (TOGETHER, NORMALISED)), why


# --- the whole way, on disk ---------------------------------------------------------------------


def small_config(model_type):
    """The configuration of a small model with every kind of layer of the real one."""
    config = default_config(model_type)
    real = build_on_meta(config)
    path, _ = find_decoder_layers(real)
    for keep in choose_layers_to_keep(find_layer_kinds(real, path, config)):
        try:
            small = shrink(config, keep)
            build_on_meta(small)
        except Exception:
            continue
        return small
    raise UnsupportedError(f"{model_type} does not shrink")


def random_push(layers, width):
    generator = torch.Generator().manual_seed(3)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
        for layer in layers
    }
    pushes = tuple(LayerPush(layer, 1.0, 1.0 + 0.1 * layer) for layer in layers)
    return Push("explicit", 1.0, (min(layers), max(layers) + 1), width, pushes, directions)


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def greedy(model, ids, tokens=10):
    for _ in range(tokens):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


IN_PLACE = sorted({row[0] for row in read_golden() if row[2] in ("native", "flag")})


@pytest.mark.parametrize("model_type", IN_PLACE)
def test_small_checkpoint_is_baked_by_its_first_route(model_type, tmp_path):
    """Plan, write and reload as for a real checkpoint: names on disk differ from names of modules."""
    with torch.random.fork_rng(devices=[]):
        model = build_random(small_config(model_type), seed=0)
    model.save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    anatomy = examine(model.config)
    route = in_place(anatomy)[0]
    push = random_push(route.layers, anatomy.hidden_size)
    plan = make_plan(checkpoint, anatomy, route, push)
    (tmp_path / "baked").mkdir()
    write_weights(checkpoint, plan.edits, tmp_path / "baked")
    write_config(checkpoint, plan.config_changes, tmp_path / "baked")

    baked, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "baked", dtype=torch.float32, output_loading_info=True
    )
    assert not any(load_report(report).values())
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    base = logits_of(model, ids)
    with steered(model, anatomy.structure, route.site, push.vectors):
        hooked, continued = logits_of(model, ids), greedy(model, ids[:1])
    effect = (hooked - base).abs().max()
    assert effect > 0.05 * base.std()
    assert (logits_of(baked.eval(), ids) - hooked).abs().max() <= 1e-4 * effect
    assert torch.equal(greedy(baked, ids[:1]), continued)


def test_shortened_reasons_hold_no_measured_number():
    assert shorten("differs from the hook by 1.1e+00 of") == "differs from the hook by … of"
