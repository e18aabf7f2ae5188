"""Next-token log-probabilities as llama.cpp computes them, asked of its own server on this machine."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError
from bake.io.bounded_http import UnreachableError, exchange
from bake.support.text import one_line

if TYPE_CHECKING:
    import torch

STARTS = 300.0  # seconds that a server has to load the model
ANSWERS = 300.0  # seconds for one answer
BYTES_A_TOKEN = 400  # of JSON that the server writes for each of the vocabulary
CONTEXT = 512  # tokens: the prompts are short


@contextmanager
def serving(server: Path, model: Path) -> Iterator[str]:
    """Run llama-server on a GGUF file while the context is open; yield its address.

    Raises BakeError with its last words where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, "-m", model, "--host", "127.0.0.1", "--port", port, "-c", CONTEXT, "-np", 1]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    said: list[str] = []
    reader = _drain(process, said)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + STARTS
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > until:
                reader.join(timeout=5)
                told = [line for line in said if "error loading" in line] or said[-3:]
                code = process.poll()
                killed = f"ended by signal {-code}; " if code is not None and code < 0 else ""
                raise BakeError(
                    f"llama.cpp does not load {model.name}: {killed}{one_line(' / '.join(told), 400)}"
                )
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(timeout=5)
        if process.stdout is not None:
            process.stdout.close()


def _drain(process: subprocess.Popen[str], said: list[str]) -> Any:
    """Read what a process says on a thread, so that it never waits for a reader; keep the last lines."""
    import threading

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.strip())
            del said[:-200]

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def _is_ready(url: str) -> bool:
    try:
        answer = exchange(f"{url}/health", until=time.monotonic() + 2, max_bytes=10_000)
    except UnreachableError:
        return False
    return answer.status == 200


def read_log_probabilities(
    url: str, prompts: Sequence[Sequence[int]], vocabulary: int, harmless: int
) -> torch.Tensor:
    """Return log p(next token) after each prompt, (prompts, vocabulary) float64, as a server has it.

    prompts: token ids. harmless: a token that is a whole letter. Raises BakeError for an answer of another
    form.
    """
    import torch

    found = torch.full((len(prompts), vocabulary), float("nan"), dtype=torch.float64)
    for row, ids in enumerate(prompts):
        asked = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": vocabulary,
            "temperature": 0,
            "cache_prompt": False,
            # What is drawn must be text: nothing is told of the end or of half a letter.
            "logit_bias": [[harmless, 1000]],
        }
        answer = exchange(
            f"{url}/completion",
            until=time.monotonic() + ANSWERS,
            max_bytes=10_000_000 + BYTES_A_TOKEN * vocabulary,
            body=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            tokens = json.loads(answer.body)["completion_probabilities"][0]["top_logprobs"]
            places = torch.tensor([entry["id"] for entry in tokens])
            values = torch.tensor([entry["logprob"] for entry in tokens], dtype=torch.float64)
            found[row, places] = values
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BakeError(
                f"llama-server answers in a form that bake does not know ({one_line(error)}): is it older "
                "than 2025?"
            ) from None
    return found
