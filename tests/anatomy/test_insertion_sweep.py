"""Inserted layers on every architecture that has no slot at `mlp_out`: minutes, so only when asked for."""

from __future__ import annotations

import pytest

from bake.anatomy import catalogue, examine
from bake.errors import UnsupportedError

pytestmark = pytest.mark.architectures

# By what makes the constant; see bake/anatomy/insertion/filling.py.
SOURCES = {
    "bias": """
        afmoe apertus axk1 axk2 bitnet deepseek_v3 deepseek_v32 dots1 flex_olmo flint
        gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text gemma4_unified gemma4_unified_text
        glm4_moe_lite glm_moe_dsa granitemoe
        granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_dense hunyuan_v1_moe
        hy_v4 hyperclovax kimi_linear laguna lfm2_moe lfm3 llama4 llama4_text
        longcat_flash mellum moss_transcribe_diarize nanochat nemotron_h olmo olmo2 olmo3
        olmoe phimoe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe
        qwen3_next vaultgemma youtu
    """,
    "value": """
        glm glm4 glm4_moe got_ocr2 mimo_v2_flash qwen2 qwen2_moe solar_open stablelm
    """,
    "squares": """
        bailing_hybrid exaone4 exaone_moe internlm3 lfm2 minimax_m2 ministral ministral3
        mistral mixtral olmo_hybrid phi3 phi4_multimodal
    """,
}
# Why not: hyper-connections and block patterns, layers that follow from their number, no MLP with room.
REFUSED = {
    "beam": "follows from its number",
    "dbrx": "no MLP of layer",
    "diffllama": "lambda_init",
    "inkling2_text": "is_block_boundary",
    "inkling_text": "conv_idx",
    "jamba": "follows from its number",
    "kolibri1": "calls it otherwise on disk",
    "minimax": "num_hidden_layers",
    "minimax_m3_vl_text": "no MLP of layer",
    "moshi": "no MLP of layer",
    "mpt": "differs from the hook",
    "qwen4_exp_text": "follows from its number",
}


@pytest.mark.parametrize(
    ("model_type", "source"),
    [(name, source) for source, names in SOURCES.items() for name in names.split()],
)
def test_a_layer_can_be_inserted(model_type, source):
    route = examine(catalogue.default_config(model_type)).insertion
    assert route.twin.passed
    assert route.twin.effect > 0.01
    assert route.rewriter.filling.source == source


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_what_cannot_be_inserted_is_refused_with_the_reason(model_type, reason):
    with pytest.raises(UnsupportedError, match=reason):
        examine(catalogue.default_config(model_type)).choose("auto", route="insert")
