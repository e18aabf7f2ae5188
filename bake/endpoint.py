"""What is a server serving? The canary of a bake, asked of an OpenAI-compatible endpoint.

An engine that has no place for a bake's biases serves the base model, often without a word. The canary
is a prompt whose greedy continuations by base and bake are recorded in `bake.json`; what the server
writes is compared with both. Where the server gives log-probabilities, they tell how sure it was of
the tokens, which separates a near-tie from another model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bake.errors import EndpointError
from bake.secrecy import without_secrets

Verdict = Literal["baked", "base", "neither"]
TIMEOUT = 120  # seconds; a server on a CPU may load the model at the first request
MAX_TOKENS = 48
SHOWN = 5  # model names
_NO_SUCH_PATH = ("not found", "method not allowed", "no reason given")
MARGIN = 8  # characters beyond where base and bake part


@dataclass(frozen=True)
class EndpointCheck:
    """What a server continued the canary with, and which model that makes it.

    agreement: {"baked" | "base": characters that the text shares with each from its start}.
    log_probability: mean of the server's tokens in nats, None where it gives none.
    """

    url: str
    model: str
    verdict: Verdict
    text: str
    baked: str
    base: str
    agreement: dict[str, int]
    log_probability: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)

    def describe(self) -> str:
        """Return the verdict, and the three continuations it rests on."""
        meaning = {
            "baked": "baked: the server runs the steered model",
            "base": "base: the server runs the base model; the biases were dropped",
            "neither": "neither: the text is not the bake's nor the base's; another model, a chat "
            "template in between, or sampling that is not greedy",
        }[self.verdict]
        sure = (
            "the server gives no log-probabilities: judged by the text alone"
            if self.log_probability is None
            else f"mean log-probability of its tokens: {self.log_probability:.3f} nats"
        )
        return "\n".join(
            (
                f"{self.model} at {self.url}",
                meaning,
                f"  server: {self.text!r}",
                f"  baked:  {self.baked!r}",
                f"  base:   {self.base!r}",
                sure,
            )
        )


def check_endpoint(url: str, model: str, directory: Path) -> EndpointCheck:
    """Ask a server for the canary of a baked directory. url: with or without `/v1`.

    Raises EndpointError for a server that is not there, does not know the model or does not complete
    text; CheckpointError for a directory without bake.json.
    """
    canary = read_canary(directory)
    text, log_probability = _complete(_join(url, "completions"), model, canary["prompt"])
    baked, base = canary["baked"], canary["base"]
    agreement = {"baked": _shared(text, baked), "base": _shared(text, base)}
    return EndpointCheck(
        without_secrets(url),
        model,
        _judge(text, baked, base),
        text,
        baked,
        base,
        agreement,
        log_probability,
    )


def read_canary(directory: Path) -> dict[str, str]:
    """Return {"prompt", "baked", "base"}; raise EndpointError where the bake has no canary."""
    from bake.record import read_result

    canary = read_result(directory)["equivalence"].get("canary")
    if not canary:
        raise EndpointError(
            f"{directory} has no canary: base and bake continue every equivalence prompt alike, or it "
            f"is thin and not yet verified"
        )
    return {key: str(canary[key]) for key in ("prompt", "baked", "base")}


def _judge(text: str, baked: str, base: str) -> Verdict:
    """Compare from where base and bake part, for a few characters: later near-ties may flip.

    White space at the start is the server's affair, and some cut a continuation short.
    """
    text, baked, base = (value.lstrip() for value in (text, baked, base))
    parting = _shared(baked, base)

    def follows(expected: str) -> bool:
        shared = _shared(text, expected)
        return shared > parting and shared >= min(parting + MARGIN, len(text), len(expected))

    if follows(baked):
        return "baked"
    return "base" if follows(base) else "neither"


def _shared(left: str, right: str) -> int:
    """Return how many characters two texts share from their start."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def _complete(url: str, model: str, prompt: str) -> tuple[str, float | None]:
    """Return the greedy continuation and its tokens' mean log-probability, where there is one.

    OpenAI counts log-probabilities, other servers switch them, and some refuse either. Some, vLLM among
    them, penalise repetition where the model's generation_config.json says so, unless they are told not to.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    wishes: dict[str, list[Any]] = {"logprobs": [1, True], "repetition_penalty": [1.0]}
    while True:
        asked = {name: values[0] for name, values in wishes.items() if values}
        try:
            return _read_answer(_request(url, {**body, **asked}, model), url)
        except _RefusedError as refused:
            named = next((name for name in asked if name in str(refused)), None)
            if named is None:
                raise
            wishes[named].pop(0)


class _RefusedError(EndpointError):
    """The server is there and said no."""


def _join(url: str, path: str) -> str:
    root = url.rstrip("/")
    return f"{root}/{path}" if root.endswith("/v1") else f"{root}/v1/{path}"


def _read_answer(answer: Any, url: str) -> tuple[str, float | None]:
    """Return the text of a completion and its tokens' mean log-probability, where there is one."""
    try:
        choice = answer["choices"][0]
        text = str(choice["text"])
    except (KeyError, IndexError, TypeError):
        raise EndpointError(
            f"{url} answers with something else than a completion; is it OpenAI-compatible?"
        ) from None
    values = list(_log_probabilities(choice.get("logprobs")))
    return text, math.fsum(values) / len(values) if values else None


def _log_probabilities(given: Any) -> Iterator[float]:
    """Yield those of a completion's tokens, in the completions' form or the chats' that mlx_lm gives."""
    if not isinstance(given, dict):
        return
    entries = [entry for entry in given.get("content") or () if isinstance(entry, dict)]
    for value in given.get("token_logprobs") or [entry.get("logprob") for entry in entries]:
        if isinstance(value, int | float):
            yield float(value)


def _request(url: str, body: dict[str, Any], model: str) -> Any:
    """POST JSON and return the answer's; raise EndpointError with what the server said."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if not url.startswith(("http://", "https://")):
        raise EndpointError(f"{url} is no http address; give one such as http://localhost:8000/v1")
    request = Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urlopen(request, timeout=TIMEOUT) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise _RefusedError(_explain(error.code, _detail(error.read()), url, model)) from None
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise EndpointError(
            f"no server answers at {url} ({reason}); start it, or correct --endpoint"
        ) from None
    except ValueError:
        raise EndpointError(f"{url} does not answer with JSON; is it OpenAI-compatible?") from None


def _detail(body: bytes) -> str:
    """Return the one line that an error's body holds."""
    try:
        values = json.loads(body)
        found = values.get("error", values.get("detail", values))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:200] or "no reason given"


def _explain(status: int, detail: str, url: str, model: str) -> str:
    known = _models(url)
    if known and model not in known:
        names = ", ".join(known[:SHOWN]) + (", …" if len(known) > SHOWN else "")
        return f"the server at {url} has no model {model!r} (HTTP {status}); it has {names}"
    if status in (404, 405) and detail.lower() in _NO_SUCH_PATH:
        return (
            f"{url} does not exist on this server (HTTP {status}: {detail}); bake needs its "
            f"completions endpoint, not only chat"
        )
    return f"the server at {url} refuses model {model!r} (HTTP {status}: {detail})"


def _models(url: str) -> list[str]:
    """Return the names that a server lists; none where it lists nothing."""
    from urllib.request import urlopen

    try:
        with urlopen(url.removesuffix("completions") + "models", timeout=TIMEOUT) as answer:
            return [str(entry["id"]) for entry in json.load(answer)["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
