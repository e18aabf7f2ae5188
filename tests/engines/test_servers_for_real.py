"""`bake verify --endpoint` with real servers: `pytest -m servers`, after `make test-engines` once.

SmolLM2 (BAKE_REAL_MODELS) and a bake of it, each served by transformers serve, mlx_lm.server, vLLM, and
llama-server on 16 and on 4 bits. Never skipped: MLX and vLLM have environments below build/engines,
llama.cpp a checkout that BAKE_LLAMA_CPP names.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from harness.record import environment
from harness.servers import served

from bake.api import export, verify_endpoint
from bake.checkpoint.checkpoint import open_checkpoint
from bake.llama_cpp.running import serving
from bake.llama_cpp.source import write_source
from bake.llama_cpp.tools import find_llama_cpp

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("default")]

BASE = Path(os.environ.get("BAKE_REAL_MODELS", "build/real-models")) / "smollm2"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return {"base", "baked": directory}."""
    baked = tmp_path_factory.mktemp("served") / "baked"
    export(BASE, pairs="formal-casual", output=baked)
    return {"base": BASE, "baked": baked}


@pytest.mark.parametrize("serves", ["baked", "base"])
@pytest.mark.parametrize("name", ["transformers", "mlx", "vllm"])
def test_a_server_is_told(name, serves, models):
    python = sys.executable if name == "transformers" else environment(name)
    model = str(models[serves])
    with served(name, python, model) as url:
        found = verify_endpoint(url, model, directory=models["baked"])
    print(f"{name} {serves}: {found.share} {found.votes}")
    assert found.verdict == serves
    assert (found.share is None) == (name == "transformers")
    if found.share is not None:
        assert abs(found.share.push - (serves == "baked")) < 0.3


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("serves", ["baked", "base"])
def test_llama_server_is_told(kind, serves, models, tmp_path):
    tools = find_llama_cpp(os.environ.get("BAKE_LLAMA_CPP"), quantises=True)
    source, file = tmp_path / "source", tmp_path / "whole.gguf"
    write_source(open_checkpoint(str(models[serves])), source)
    (tmp_path / "metadata.json").write_text("{}")
    tools.convert(source, file, "f16", tmp_path / "metadata.json")
    if kind != "F16":
        tools.quantise(file, tmp_path / "small.gguf", kind)
        file = tmp_path / "small.gguf"
    with serving(tools.server, file) as url:
        found = verify_endpoint(url, "m", directory=models["baked"])
    print(f"{kind} {serves}: {found.share} {found.votes}")
    assert found.verdict == serves
    assert abs(found.share.push - (serves == "baked")) < (0.1 if kind == "F16" else 0.3)
