"""Bakes run in llama.cpp for real: `make test-engines`, or `pytest -m engines` with BAKE_LLAMA_CPP.

BAKE_LLAMA_CPP names a checkout in which llama-server and llama-quantize were built. Never skipped. The
families are small and random, with the tokenizer of SmolLM2 (BAKE_REAL_MODELS), which llama.cpp's converter
has to know; configs are taken as transformers saves them and as they are published, with `rope_theta`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from bake.api import export, gguf, inspect
from bake.engines.survival import survival_of
from bake.errors import BakeError

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

REAL = Path(os.environ.get("BAKE_REAL_MODELS", "build/real-models"))
WIDTH = 64
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"residual_multiplier": 0.5},
    "qwen3": {"head_dim": 16},
    "smollm3": {},
    "cohere": {},
    "mistral": {"sliding_window": None},
}


@pytest.fixture(scope="session")
def llama_cpp():
    found = os.environ.get("BAKE_LLAMA_CPP")
    if not found:
        pytest.fail("BAKE_LLAMA_CPP names no checkout of llama.cpp (make test-engines builds one)")
    return found


@pytest.fixture(scope="session")
def tokenizer():
    if not (REAL / "smollm2").is_dir():
        pytest.fail(f"{REAL}/smollm2 is not there: make test-real makes it")
    return AutoTokenizer.from_pretrained(REAL / "smollm2", trust_remote_code=False)


def build(family, tokenizer, directory, *, published):
    config = CONFIG_MAPPING[family](**COMMON, vocab_size=len(tokenizer), **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if published:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        rope = values.pop("rope_parameters")
        path.write_text(json.dumps({**values, "rope_theta": rope["rope_theta"]}))


@pytest.mark.parametrize("published", [False, True], ids=["rope_parameters", "rope_theta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_does_what_the_facts_say(family, published, tokenizer, llama_cpp, tmp_path):
    base = tmp_path / "base"
    build(family, tokenizer, base, published=published)
    anatomy = inspect(base)
    routes = {route.site: route for route in anatomy.routes if route.route != "insert"}
    checked = 0
    for site, route in routes.items():
        verdict = survival_of("llama.cpp", route.outline(anatomy.model_type)).verdict
        torch.manual_seed(1)
        baked = tmp_path / site
        vector = torch.randn(WIDTH)
        options = {"direction": vector, "site": site, "convert_site": True, "multiplier": 3.0}
        export(base, **options, output=baked)
        output = tmp_path / f"{site}.gguf"
        if verdict == "kept":
            found = gguf(baked, output=output, base=base, llama_cpp=llama_cpp)
            assert found.check.cosine > 0.9999, site
            assert abs(found.check.ratio - 1) < 1e-3, site
            assert found.check.effect > 1e-4, site
            checked += 1
        elif verdict != "unknown":
            with pytest.raises(BakeError):
                gguf(baked, output=output, base=base, llama_cpp=llama_cpp)
            assert not output.exists()
    assert checked


@pytest.mark.parametrize(("kind", "cosine"), [("Q8_0", 0.98), ("Q4_K_M", 0.95), ("Q2_K", 0.8)])
def test_a_push_survives_quantisation(kind, cosine, llama_cpp, tmp_path):
    export(REAL / "smollm2", pairs="formal-casual", output=tmp_path / "out")
    found = gguf(tmp_path / "out", output=tmp_path / "q.gguf", quantize=kind, llama_cpp=llama_cpp)
    assert found.check.holds
    assert found.check.cosine > cosine
