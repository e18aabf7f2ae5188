"""Bakes run in llama.cpp for real: `make test-engines`, or `pytest -m engines` with BAKE_LLAMA_CPP.

BAKE_LLAMA_CPP names a checkout in which llama-server and llama-quantize were built. Never skipped. What is
not SmolLM2 itself (BAKE_REAL_MODELS) is small and random, with its tokenizer, which llama.cpp's converter
has to know. The families are run one by one by `benchmarks/engines.py`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from harness.llama_cpp import write_sentencepiece
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from bake.api import export, gguf, verify_endpoint
from bake.checkpoint.checkpoint import open_checkpoint
from bake.llama_cpp.running import serving
from bake.llama_cpp.source import write_source
from bake.llama_cpp.tools import find_llama_cpp

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


def build(tokenizer, directory):
    """Write a small random Qwen 3 with SmolLM2's tokenizer, which llama.cpp's converter knows."""
    config = CONFIG_MAPPING["qwen3"](**COMMON, vocab_size=len(tokenizer), head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.ndim > 1 else 0.05))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "smollm2"])
def test_what_is_served_is_recognised(family, tokenizer, llama_cpp, tmp_path):
    """From export to a file that llama-server serves, and `verify --endpoint` says which it is."""
    base = tmp_path / "base"
    if family != "qwen3":
        shutil.copytree(REAL / family, base)
        if family == "gemma3":
            write_sentencepiece(
                base
            )  # As Gemma's own repository has it; the converter asks for it.
        export(base, pairs="formal-casual", target="llama.cpp", output=tmp_path / "baked")
    else:
        build(tokenizer, base)
        torch.manual_seed(1)
        # At the one site that --target llama.cpp takes; pairs would be too few for a random model.
        place = {"site": "attn_in", "convert_site": True, "target": "llama.cpp"}
        export(
            base, direction=torch.randn(WIDTH), **place, multiplier=3.0, output=tmp_path / "baked"
        )
    made = gguf(tmp_path / "baked", output=tmp_path / "baked.gguf", base=base, llama_cpp=llama_cpp)
    assert made.check.cosine > 0.999
    tools = find_llama_cpp(llama_cpp, quantises=False)
    write_source(open_checkpoint(str(base)), tmp_path / "source")
    (tmp_path / "metadata.json").write_text("{}")
    files = {"baked": tmp_path / "baked.gguf", "base": tmp_path / "base.gguf"}
    tools.convert(tmp_path / "source", files["base"], "auto", tmp_path / "metadata.json")
    for name, file in files.items():
        with serving(tools.server, file) as url:
            found = verify_endpoint(url, "m", directory=tmp_path / "baked")
        assert found.verdict == name
        assert found.share is not None
        assert abs(found.share.push - (name == "baked")) < 0.1


@pytest.mark.parametrize(("kind", "cosine"), [("Q8_0", 0.98), ("Q4_K_M", 0.95), ("Q2_K", 0.8)])
def test_a_push_survives_quantisation(kind, cosine, llama_cpp, tmp_path):
    export(REAL / "smollm2", pairs="formal-casual", output=tmp_path / "out")
    found = gguf(tmp_path / "out", output=tmp_path / "q.gguf", quantize=kind, llama_cpp=llama_cpp)
    assert found.check.holds
    assert found.check.cosine > cosine
