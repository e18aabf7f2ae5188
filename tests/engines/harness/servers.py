"""Servers of other engines, run on a checkpoint or a file while a context is open."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

# What each engine's own Python is given. transformers serve tells no log-probabilities.
COMMANDS = {
    "transformers": "-m transformers.cli.transformers serve --host 127.0.0.1 --port {port} --device cpu",
    "mlx": "-m mlx_lm.server --model {model} --host 127.0.0.1 --port {port}",
    "vllm": "-m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port}"
    " --max-model-len 512 --enforce-eager",
    "llama-cpp-python": "-m llama_cpp.server --model {model} --host 127.0.0.1 --port {port}"
    " --logits_all true --n_ctx 512",
}
SECONDS = 240  # that a server has to answer


@contextmanager
def served(name: str, python: Path | str, model: Path | str) -> Iterator[str]:
    """Serve a model; yield the address. Raises RuntimeError where the server ends or does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [part.format(port=port, model=model) for part in COMMANDS[name].split()]
    process = subprocess.Popen(
        [str(python), *command],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(SECONDS):
        if process.poll() is not None:
            raise RuntimeError("the server has ended")
        try:
            with urlopen(f"{url}/models"):
                return
        except HTTPError:
            return  # It answers, if only that it has no cache to list models from.
        except (URLError, ConnectionError):
            time.sleep(1)
    raise RuntimeError("the server does not answer")
