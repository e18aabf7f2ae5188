"""What writes to the residual stream: found on the twin, refused where nothing exact is left."""

from __future__ import annotations

import pytest
import torch
from conftest import CONFIGS
from transformers import AutoConfig

from bake.anatomy import erasure, examine
from bake.anatomy import writes as search
from bake.anatomy.catalogue import default_config
from bake.anatomy.examination import forget_examinations
from bake.errors import UnsupportedError
from bake.writes import SCOPES, Write

# {architecture: (parameters that write in layer 0, each with its axis; the embeddings)}
EXPECTED = {
    "llama": (
        {"self_attn.o_proj.weight": -2, "mlp.down_proj.weight": -2},
        {"model.embed_tokens.weight": -1},
    ),
    "mixtral": (
        {"self_attn.o_proj.weight": -2, "mlp.experts.down_proj": -2},
        {"model.embed_tokens.weight": -1},
    ),
    "gpt2": (
        {
            "attn.c_proj.weight": -1,
            "attn.c_proj.bias": -1,
            "mlp.c_proj.weight": -1,
            "mlp.c_proj.bias": -1,
        },
        {"transformer.wte.weight": -1, "transformer.wpe.weight": -1},
    ),
    "opt": (
        {
            "self_attn.out_proj.weight": -2,
            "self_attn.out_proj.bias": -1,
            "fc2.weight": -2,
            "fc2.bias": -1,
        },
        {"model.decoder.embed_tokens.weight": -1, "model.decoder.embed_positions.weight": -1},
    ),
    # A hybrid: three blocks a layer, two of them side by side, each behind a multiplier.
    "falcon_h1": (
        {
            "mamba.out_proj.weight": -2,
            "self_attn.o_proj.weight": -2,
            "feed_forward.down_proj.weight": -2,
        },
        {"model.embed_tokens.weight": -1},
    ),
    # A parallel block, whose sum is made in place.
    "falcon": (
        {"self_attention.dense.weight": -2, "mlp.dense_4h_to_h.weight": -2},
        {"transformer.word_embeddings.weight": -1},
    ),
    "gpt_oss": (
        {
            "self_attn.o_proj.weight": -2,
            "self_attn.o_proj.bias": -1,
            "mlp.experts.down_proj": -1,
            "mlp.experts.down_proj_bias": -1,
        },
        {"model.embed_tokens.weight": -1},
    ),
}


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_what_writes_is_found(architecture):
    found = examine(default_config(architecture)).ablation
    assert found.refusals == {}
    assert found.writes is not None
    layer = found.writes.by_layer[0]
    inside, embeddings = EXPECTED[architecture]
    named = {w.parameter.split(".0.", 1)[1]: w.axis for w in layer.writes}
    assert named == inside
    assert {w.parameter: w.axis for w in found.writes.embeddings} == embeddings
    for scope in SCOPES:
        verdict = found.verdicts[scope]
        assert verdict.passed
        assert verdict.effect > 0.05
        assert verdict.push_error <= 1e-4


@pytest.mark.parametrize("architecture", ["gemma3_text", "olmo2"])
def test_behind_a_post_norm_nothing_can_be_taken_out(architecture):
    anatomy = examine(default_config(architecture))
    assert set(anatomy.ablation.refusals) == set(SCOPES)
    with pytest.raises(UnsupportedError, match=r"self_attn writes is not simply added.*a norm"):
        anatomy.ablation.choose("stream", architecture)


@pytest.mark.parametrize("architecture", ["bert", "bloom", "xglm"])
def test_embeddings_behind_a_norm_or_made_of_no_parameter_are_refused(architecture):
    refusals = examine(default_config(architecture)).ablation.refusals
    assert "not made by embeddings alone" in refusals["stream"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_untied_and_no_other(tied):
    config = AutoConfig.for_model("llama", **CONFIGS["llama"], tie_word_embeddings=tied)
    writes = examine(config).ablation.writes
    assert writes is not None
    untying = writes.untying
    assert (untying is not None) == tied
    if untying is not None:
        assert untying.head == "lm_head.weight"
        assert untying.flags == {"tie_word_embeddings": False}


def verdicts_of(architecture: str, **options):
    config = AutoConfig.for_model(architecture, **{**CONFIGS.get(architecture, {}), **options})
    return examine(config).ablation


def test_a_forgotten_embedding_is_caught_on_the_twin(examined_anew, monkeypatch):
    real = erasure.WriteMap.of

    def forgetful(self, ablation):
        return tuple(entry for entry in real(self, ablation) if entry[1] is not None)

    monkeypatch.setattr(erasure.WriteMap, "of", forgetful)
    found = verdicts_of("llama")
    assert "differs from the hook" in found.refusals["stream"]
    assert "writes" not in found.refusals  # Which has no part in embeddings.


def test_a_forgotten_expert_is_caught_on_the_twin(examined_anew, monkeypatch):
    real = erasure._sources

    def forgetful(checkpoint, names, write):
        found = real(checkpoint, names, write)
        return found[:-1] if len(found) > 1 else found

    monkeypatch.setattr(erasure, "_sources", forgetful)
    found = verdicts_of("mixtral")
    assert set(found.refusals) == set(SCOPES)
    assert all("differs from the hook" in reason for reason in found.refusals.values())


def test_a_transposed_matrix_is_caught_on_the_twin(examined_anew, monkeypatch):
    """Where a matrix is square, the wrong axis fits."""
    real = search._find_writes

    def transposed(twin, names, read):
        return [
            Write(write.parameter, -1 if "o_proj" in write.parameter else write.axis)
            for write in real(twin, names, read)
        ]

    monkeypatch.setattr(search, "_find_writes", transposed)
    found = verdicts_of("llama")
    assert set(found.refusals) == set(SCOPES)


def test_a_head_that_stays_tied_is_caught_on_the_twin(examined_anew, monkeypatch):
    monkeypatch.setattr(search, "find_untying", lambda *_: None)
    found = verdicts_of("llama", tie_word_embeddings=True)
    assert "differs from the hook" in found.refusals["stream"]


def test_a_forgotten_bias_is_caught_on_the_twin(examined_anew, monkeypatch):
    real = search._find_writes

    def forgetful(twin, names, read):
        return [write for write in real(twin, names, read) if "bias" not in write.parameter]

    monkeypatch.setattr(search, "_find_writes", forgetful)
    found = verdicts_of("gpt2")
    assert set(found.refusals) == set(SCOPES)


def test_examining_leaves_torch_as_it_was():
    before = torch.random.get_rng_state()
    forget_examinations()
    assert verdicts_of("llama").refusals == {}
    assert torch.equal(torch.random.get_rng_state(), before)
