"""What is a server serving? The canary of a bake, asked of an OpenAI-compatible endpoint.

An engine that has no place for a bake's biases serves the base model, often without a word. The canary
is a prompt whose greedy continuations by base and bake are recorded in `bake.json`; what the server
writes is compared with both. A quantised model soon writes another text, so that forks decide where the
bake has them: texts after which base and bake go on with different words, the surest first, one vote each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bake.engines.server import RefusedError, Server, first_choice
from bake.errors import EndpointError

Verdict = Literal["baked", "base", "neither"]
DEADLINE = 120.0  # seconds for all of it; a server on a CPU may load the model at the first request
MAX_TOKENS = 48
LEAST = 10_000  # nats, beyond which a number is no log-probability
MARGIN = 8  # characters beyond where base and bake part
FORK_TOKENS, FEWEST_FORKS = 4, 3


@dataclass(frozen=True)
class EndpointCheck:
    """What a server continued the canary with, and which model that makes it.

    agreement: {"baked" | "base": characters that the text shares with each from its start}. votes:
    {"baked" | "base" | "other": forks at which the server went on so}; empty for a bake without forks.
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
    votes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)

    def _describe_votes(self) -> str:
        """Return how the forks were answered, and what that says of the weights."""
        total = sum(self.votes.values())
        counted = ", ".join(f"{count} as {name}" for name, count in self.votes.items() if count)
        said = f"of {total} places where base and bake part: {counted}"
        expected = {"baked": self.baked, "base": self.base}.get(self.verdict)
        if self.verdict == "neither":
            return f"{said}; perhaps quantised so far that the two cannot be told apart"
        if self.votes[self.verdict] < total or not self.text.strip().startswith(
            (expected or "").strip()
        ):
            return f"{said}; not word for word: perhaps quantised"
        return said

    def describe(self) -> str:
        """Return the verdict, and the three continuations it rests on."""
        meaning = {
            "baked": "baked: the server runs the steered model",
            "base": "base: the server runs the base model; the biases were dropped",
            "neither": "neither: the text is not the bake's nor the base's; another model, a chat "
            "template in between, or sampling that is not greedy",
        }[self.verdict]
        if self.votes:
            meaning = f"{meaning}\n  {self._describe_votes()}"
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


def check_endpoint(
    url: str, model: str, canary: Mapping[str, str], forks: Sequence[Mapping[str, str]] = ()
) -> EndpointCheck:
    """Ask a server for a bake's canary and forks: {"prompt", "baked", "base"}. url: with or without `/v1`.

    Raises EndpointError for a server that is not there, does not know the model or does not complete
    text; CheckpointError for a directory without bake.json.
    """
    server = Server(url, model, "--endpoint")
    until = time.monotonic() + DEADLINE
    text, log_probability = _complete(server, canary["prompt"], until)
    baked, base = canary["baked"], canary["base"]
    agreement = {"baked": _shared(text, baked), "base": _shared(text, base)}
    votes: dict[str, int] = {}
    if len(forks) >= FEWEST_FORKS:
        answers = ask_forks(server, forks, until)
        votes = {each: answers.count(each) for each in ("baked", "base", "other")}
    return EndpointCheck(
        server.name,
        model,
        _decide(votes, _judge(text, baked, base)),
        text,
        baked,
        base,
        agreement,
        log_probability,
        votes,
    )


def ask_forks(server: Server, forks: Sequence[Mapping[str, str]], until: float) -> list[str]:
    """Return whose word a server goes on with after each fork: "baked", "base" or "other"."""
    answers = []
    for fork in forks:
        said = _complete(server, fork["prompt"], until, FORK_TOKENS)[0].lstrip()
        own = (each for each in ("baked", "base") if said.startswith(fork[each].strip()))
        answers.append(next(own, "other"))
    return answers


def _decide(votes: Mapping[str, int], told: Verdict) -> Verdict:
    """Return what the forks say; where they are undecided, or none are there, what the long text tells."""
    counted = count_votes(votes) if votes else "neither"
    return told if counted == "neither" else counted


def count_votes(votes: Mapping[str, int]) -> Verdict:
    """Return whose the votes are: more than twice the other's; for the bake half, for the base a third.

    To call a base baked is the worse mistake.
    """
    total = sum(votes.values())
    if 2 * votes["baked"] >= total and votes["baked"] > 2 * votes["base"]:
        return "baked"
    return (
        "base" if 3 * votes["base"] >= total and votes["base"] > 2 * votes["baked"] else "neither"
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


def _complete(
    server: Server, prompt: str, until: float, max_tokens: int = MAX_TOKENS
) -> tuple[str, float | None]:
    """Return the greedy continuation and its tokens' mean log-probability, where there is one.

    OpenAI counts log-probabilities, other servers switch them, and some refuse either. Some, vLLM among
    them, penalise repetition where the model's generation_config.json says so, unless they are told not to.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    wishes: dict[str, list[Any]] = {"logprobs": [1, True], "repetition_penalty": [1.0]}
    while True:
        asked = {name: values[0] for name, values in wishes.items() if values}
        try:
            answer = server.ask("completions", {**body, **asked}, until)
            return _read_answer(answer, server.address("completions"))
        except RefusedError as refused:
            named = next((name for name in asked if name in str(refused)), None)
            if named is None:
                raise
            wishes[named].pop(0)


def _read_answer(answer: dict[str, Any], url: str) -> tuple[str, float | None]:
    """Return the text of a completion and its tokens' mean log-probability, where there is one."""
    choice = first_choice(answer, url)
    text = choice.get("text")
    if not isinstance(text, str):
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
