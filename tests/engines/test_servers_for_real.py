"""`bake verify --endpoint` with real servers: `pytest -m servers`, after `make test-engines` once.

SmolLM2 (BAKE_REAL_MODELS) and a bake of it, each served by transformers serve, mlx_lm.server, vLLM, and
llama-server on 16 and on 4 bits. Never skipped: MLX and vLLM have environments below build/engines,
llama.cpp a checkout that BAKE_LLAMA_CPP names.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from harness.record import environment

from bake.api import export, verify_endpoint
from bake.checkpoint.checkpoint import open_checkpoint
from bake.llama_cpp.running import serving
from bake.llama_cpp.source import write_source
from bake.llama_cpp.tools import find_llama_cpp

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("default")]

BASE = Path(os.environ.get("BAKE_REAL_MODELS", "build/real-models")) / "smollm2"
# (what runs it, its arguments). transformers serve tells no log-probabilities.
SERVERS = {
    "transformers": (
        lambda: sys.executable,
        "-m transformers.cli.transformers serve --host 127.0.0.1 --port {port} --device cpu",
    ),
    "mlx": (
        lambda: environment("mlx"),
        "-m mlx_lm.server --model {model} --host 127.0.0.1 --port {port}",
    ),
    "vllm": (
        lambda: environment("vllm"),
        "-m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port}"
        " --max-model-len 512 --enforce-eager",
    ),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return {"base", "baked": directory}."""
    baked = tmp_path_factory.mktemp("served") / "baked"
    export(BASE, pairs="formal-casual", output=baked)
    return {"base": BASE, "baked": baked}


@pytest.mark.parametrize("served", ["baked", "base"])
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_told(name, served, models):
    runs, arguments = SERVERS[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(models[served])
    command = [part.format(port=port, model=model) for part in arguments.split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    room = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([str(runs()), *command], env={**os.environ, **room}, **quiet)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        wait_for(url, process)
        found = verify_endpoint(url, model, directory=models["baked"])
    finally:
        process.terminate()
        process.wait()
    print(f"{name} {served}: {found.share} {found.votes}")
    assert found.verdict == served
    assert (found.share is None) == (name == "transformers")
    if found.share is not None:
        assert abs(found.share.push - (served == "baked")) < 0.3


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
@pytest.mark.parametrize("served", ["baked", "base"])
def test_llama_server_is_told(kind, served, models, tmp_path):
    tools = find_llama_cpp(os.environ.get("BAKE_LLAMA_CPP"), quantises=True)
    source, file = tmp_path / "source", tmp_path / "whole.gguf"
    write_source(open_checkpoint(str(models[served])), source)
    (tmp_path / "metadata.json").write_text("{}")
    tools.convert(source, file, "f16", tmp_path / "metadata.json")
    if kind != "F16":
        tools.quantise(file, tmp_path / "small.gguf", kind)
        file = tmp_path / "small.gguf"
    with serving(tools.server, file) as url:
        found = verify_endpoint(url, "m", directory=models["baked"])
    print(f"{kind} {served}: {found.share} {found.votes}")
    assert found.verdict == served
    assert abs(found.share.push - (served == "baked")) < (0.1 if kind == "F16" else 0.3)


def wait_for(url, process):
    for _ in range(240):
        assert process.poll() is None, "the server has ended"
        try:
            with urlopen(f"{url}/models"):
                return
        except HTTPError:
            return  # It answers, if only that it has no cache to list models from.
        except (URLError, ConnectionError):
            time.sleep(1)
    pytest.fail("the server does not answer")
