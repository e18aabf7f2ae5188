"""What is a server serving? The canary of a bake, asked of an OpenAI-compatible endpoint.

An engine that has no place for a bake's biases serves the base model, often without a word. The canary
is a prompt whose greedy continuations by base and bake are recorded in `bake.json`; what the server
writes is compared with both. Where the server gives log-probabilities, they tell how sure it was of
the tokens, which separates a near-tie from another model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bake.errors import EndpointError
from bake.io.bounded_http import UnreachableError, exchange
from bake.io.foreign_json import parse_json
from bake.redaction import without_secrets
from bake.support.text import one_line

Verdict = Literal["baked", "base", "neither"]
DEADLINE = 120.0  # seconds for all of it; a server on a CPU may load the model at the first request
MAX_ANSWER = 1_000_000  # bytes
MAX_TOKENS = 48
SHOWN = 5  # model names
LEAST = 10_000  # nats, beyond which a number is no log-probability
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


def check_endpoint(url: str, model: str, canary: Mapping[str, str]) -> EndpointCheck:
    """Ask a server for a bake's canary: {"prompt", "baked", "base"}. url: with or without `/v1`.

    Raises EndpointError for a server that is not there, does not know the model or does not complete
    text; CheckpointError for a directory without bake.json.
    """
    if not url.startswith(("http://", "https://")):
        raise EndpointError(f"{url} is no http address; give one such as http://localhost:8000/v1")
    until = time.monotonic() + DEADLINE
    text, log_probability = _complete(_join(url, "completions"), model, canary["prompt"], until)
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


def _complete(url: str, model: str, prompt: str, until: float) -> tuple[str, float | None]:
    """Return the greedy continuation and its tokens' mean log-probability, where there is one.

    OpenAI counts log-probabilities, other servers switch them, and some refuse either. Some, vLLM among
    them, penalise repetition where the model's generation_config.json says so, unless they are told not to.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    wishes: dict[str, list[Any]] = {"logprobs": [1, True], "repetition_penalty": [1.0]}
    while True:
        asked = {name: values[0] for name, values in wishes.items() if values}
        try:
            return _read_answer(_request(url, {**body, **asked}, model, until), url)
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


def _read_answer(answer: dict[str, Any], url: str) -> tuple[str, float | None]:
    """Return the text of a completion and its tokens' mean log-probability, where there is one."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = choice.get("text") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(text, str):
        raise EndpointError(
            f"{url} answers with something else than a completion; is it OpenAI-compatible?"
        )
    values = list(_log_probabilities(choice.get("logprobs")))
    return text, math.fsum(values) / len(values) if values else None


def _log_probabilities(given: Any) -> Iterator[float]:
    """Yield those of a completion's tokens, in the completions' form or the chats' that mlx_lm gives."""
    if not isinstance(given, dict):
        return
    content, values = given.get("content"), given.get("token_logprobs")
    entries = [e for e in content if isinstance(e, dict)] if isinstance(content, list) else []
    if not isinstance(values, list) or not values:
        values = [entry.get("logprob") for entry in entries]
    # A log-probability is never far below 0; a server may send any number.
    yield from (float(v) for v in values if type(v) in (int, float) and -LEAST <= v <= LEAST)


def _request(url: str, body: dict[str, Any], model: str, until: float) -> Any:
    """POST JSON and return the answer's; raise EndpointError with what the server said."""
    headers = {"Content-Type": "application/json"}
    try:
        answer = exchange(
            url,
            until=until,
            max_bytes=MAX_ANSWER,
            body=json.dumps(body).encode(),
            headers=headers,
        )
    except UnreachableError as error:
        raise EndpointError(
            f"no server answers at {url} ({one_line(error)}); start it, or correct --endpoint"
        ) from None
    if answer.location is not None and 300 <= answer.status < 400:
        raise EndpointError(
            f"the server at {url} sends the request on to {one_line(answer.location)}; bake follows "
            f"nobody elsewhere: give that address as --endpoint if you trust it"
        )
    if answer.status >= 300:
        detail = _detail(answer.body)
        raise _RefusedError(_explain(answer.status, detail, url, model, until))
    return _parse(answer.body, url)


def _parse(body: bytes, url: str) -> dict[str, Any]:
    values: dict[str, Any] = parse_json(
        body, f"the answer of {url}", error=EndpointError, remedy="is it OpenAI-compatible?"
    )
    return values


def _detail(body: bytes) -> str:
    """Return the one line that an error's body holds."""
    try:
        values = _parse(body, "")
        found = values.get("error", values.get("detail", values))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except EndpointError:
        text = body.decode(errors="replace")
    return one_line(text) or "no reason given"


def _explain(status: int, detail: str, url: str, model: str, until: float) -> str:
    known = _models(url, until)
    if known and model not in known:
        shown = [one_line(name) for name in known[:SHOWN]]
        names = ", ".join(shown) + (", …" if len(known) > SHOWN else "")
        return f"the server at {url} has no model {model!r} (HTTP {status}); it has {names}"
    if status in (404, 405) and detail.lower() in _NO_SUCH_PATH:
        return (
            f"{url} does not exist on this server (HTTP {status}: {detail}); bake needs its "
            f"completions endpoint, not only chat"
        )
    return f"the server at {url} refuses model {model!r} (HTTP {status}: {detail})"


def _models(url: str, until: float) -> list[str]:
    """Return the names that a server lists; none where it lists nothing."""
    try:
        listed = url.removesuffix("completions") + "models"
        answer = exchange(listed, until=until, max_bytes=MAX_ANSWER)
        entries = _parse(answer.body, url).get("data")
    except EndpointError:
        return []
    listed_entries = entries if isinstance(entries, list) else []
    names = [entry.get("id") for entry in listed_entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]
