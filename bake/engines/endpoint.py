"""What is a server serving? The canary of a bake, asked of an OpenAI-compatible endpoint.

An engine that has no place for a bake's biases serves the base model, often without a word. The canary
is a prompt whose greedy continuations by base and bake are recorded in `bake.json`; what the server
writes is compared with both. A quantised model soon writes another text, so that forks decide where the
bake has them: texts after which base and bake go on with different words, the surest first. A server that
tells log-probabilities is asked how far it is on the way from the one to the other; of another the words
are counted, one vote each.
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
_SPACES = "\u0120\u2581 "  # as vocabularies write a space, which mlx_lm tells as it is there
TOP = (20, 10, 5)  # most likely tokens that are asked for, where a server grants them
# On the way from base (0) to bake (1), and how much of the way may be off before it is neither.
FROM_HERE_BAKED, UP_TO_HERE_BASE, MOST_OFF = 0.65, 0.4, 0.6


@dataclass(frozen=True)
class Share:
    """How much of the push a server has, by log-probabilities.

    push: where the server's tilts lie between the base's (0) and the bake's (1), by least squares.
    off: root of the squared rest, of the squared distances between the two: 0 for either model itself.
    """

    push: float
    off: float
    forks: int

    @property
    def verdict(self) -> Verdict:
        """Which of the two it is, where it is one."""
        if self.off > MOST_OFF:
            return "neither"
        if self.push >= FROM_HERE_BAKED:
            return "baked"
        return "base" if self.push <= UP_TO_HERE_BASE else "neither"


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
    share: Share | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return asdict(self)

    def _describe_votes(self) -> str:
        """Return how the forks were answered, and what that says of the weights."""
        total = sum(self.votes.values())
        counted = ", ".join(f"{count} as {name}" for name, count in self.votes.items() if count)
        said = f"of {total} places where base and bake part: {counted}"
        expected = {"baked": self.baked, "base": self.base}.get(self.verdict)
        if self.share is not None:
            share = f"{self.share.push:.0%} of the push (± {self.share.off:.0%})"
            said = f"{said}; by log-probabilities it has {share}"
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
    url: str, model: str, canary: Mapping[str, str], forks: Sequence[Mapping[str, Any]] = ()
) -> EndpointCheck:
    """Ask a server for a bake's canary and forks: {"prompt", "baked", "base"}, of forks the tilts as well.

    url: with or without `/v1`.

    Raises EndpointError for a server that is not there, does not know the model or does not complete
    text; CheckpointError for a directory without bake.json.
    """
    server = Server(url, model, "--endpoint")
    until = time.monotonic() + DEADLINE
    text, log_probability = _complete(server, canary["prompt"], until)
    baked, base = canary["baked"], canary["base"]
    agreement = {"baked": _shared(text, baked), "base": _shared(text, base)}
    votes: dict[str, int] = {}
    share = None
    if len(forks) >= FEWEST_FORKS:
        answers = ask_forks(server, forks, until)
        said = [answer.word for answer in answers]
        votes = {each: said.count(each) for each in ("baked", "base", "other")}
        share = measure_share(forks, answers)
    return EndpointCheck(
        server.name,
        model,
        decide(votes, share, _judge(text, baked, base)),
        text,
        baked,
        base,
        agreement,
        log_probability,
        votes,
        share,
    )


@dataclass(frozen=True)
class Answer:
    """What a server says after a fork. word: "baked", "base" or "other". tilt: nats by which it has the
    bake's token before the base's; None where it tells of neither.
    """

    word: str
    tilt: float | None


def ask_forks(server: Server, forks: Sequence[Mapping[str, Any]], until: float) -> list[Answer]:
    """Return how a server goes on after each fork."""
    answers = []
    for fork in forks:
        choice = _ask(server, fork["prompt"], until, FORK_TOKENS, [*TOP, 1, True])
        said = _text_of(choice, server.address("completions")).lstrip()
        own = (each for each in ("baked", "base") if said.startswith(fork[each].strip()))
        answers.append(Answer(next(own, "other"), _tilt(choice.get("logprobs"), fork)))
    return answers


def measure_share(forks: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> Share | None:
    """Return how much of the push is in a server's tilts; None where too few of them are told."""
    told = [
        (fork["tilt_base"], fork["tilt_baked"] - fork["tilt_base"], answer.tilt)
        for fork, answer in zip(forks, answers, strict=True)
        if answer.tilt is not None
        # Of a stranger's bake.json: a number may be any.
        and all(abs(fork.get(key, math.inf)) <= LEAST for key in ("tilt_base", "tilt_baked"))
    ]
    way = math.fsum(gap * gap for _, gap, _ in told)
    if len(told) < FEWEST_FORKS or way <= 0:
        return None
    push = math.fsum((tilt - base) * gap for base, gap, tilt in told) / way
    rest = math.fsum((tilt - base - push * gap) ** 2 for base, gap, tilt in told)
    return Share(push, math.sqrt(rest / way), len(told))


def _tilt(given: Any, fork: Mapping[str, Any]) -> float | None:
    """Return log p(bake's token) − log p(base's) of the first token that a server was to say.

    A token that is not among the most likely is taken to be as likely as the last of them.
    """
    told = dict(_most_likely(given))
    known = [told.get(fork[each].strip()) for each in ("baked", "base")]
    if len(told) < 2 or known == [None, None]:
        return None
    least = min(told.values())
    baked, base = (least if value is None else value for value in known)
    return baked - base


def _most_likely(given: Any) -> Iterator[tuple[str, float]]:
    """Yield (token's text without spaces around it, log-probability) of the first token's most likely.

    In the completions' form, {token: log-probability}, or the chats', a list of objects. Of tokens that
    differ in spaces alone the likelier counts: the last that is yielded.
    """
    if not isinstance(given, dict):
        return
    content, plain = given.get("content"), given.get("top_logprobs")
    first: Any = plain[0] if isinstance(plain, list) and plain else None
    if first is None and isinstance(content, list) and content and isinstance(content[0], dict):
        first = content[0].get("top_logprobs")
    entries: list[tuple[Any, Any]] = []
    if isinstance(first, dict):
        entries = list(first.items())
    elif isinstance(first, list):
        entries = [(e.get("token"), e.get("logprob")) for e in first if isinstance(e, dict)]
    sound = [
        (token.lstrip(_SPACES).strip(), float(value))
        for token, value in entries
        if isinstance(token, str) and type(value) in (int, float) and -LEAST <= value <= LEAST
    ]
    yield from sorted(sound, key=lambda entry: entry[1])


def decide(votes: Mapping[str, int], share: Share | None, told: Verdict = "neither") -> Verdict:
    """Return what the log-probabilities say, else the forks' words, else what the long text tells."""
    counted = count_votes(votes) if votes else "neither"
    if share is not None and share.verdict != "neither":
        # Both have to allow it: words that are the other's tell of another model or another text.
        return share.verdict if counted in ("neither", share.verdict) else "neither"
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


def _complete(server: Server, prompt: str, until: float) -> tuple[str, float | None]:
    """Return the greedy continuation and its tokens' mean log-probability, where there is one."""
    choice = _ask(server, prompt, until, MAX_TOKENS, [1, True])
    values = list(_log_probabilities(choice.get("logprobs")))
    text = _text_of(choice, server.address("completions"))
    return text, math.fsum(values) / len(values) if values else None


def _ask(
    server: Server, prompt: str, until: float, max_tokens: int, logprobs: list[Any]
) -> dict[str, Any]:
    """Return the first choice of a greedy completion. logprobs: what to ask for, from the best.

    OpenAI counts log-probabilities, other servers switch them, and some refuse either. Some, vLLM among
    them, penalise repetition where the model's generation_config.json says so, unless they are told not to.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    # mlx_lm switches them and counts the alternatives in a key of its own; it is looked for first, because
    # the name of the switch is a part of its name.
    counted = [10] if len(logprobs) > 2 else []
    wishes: dict[str, list[Any]] = {"top_logprobs": counted, "logprobs": [*logprobs]}
    wishes |= {"repetition_penalty": [1.0]}
    while True:
        asked = {name: values[0] for name, values in wishes.items() if values}
        if asked.get("logprobs") is not True:
            asked.pop("top_logprobs", None)
        try:
            answer = server.ask("completions", {**body, **asked}, until)
            return first_choice(answer, server.address("completions"))
        except RefusedError as refused:
            named = next((name for name in asked if name in str(refused)), None)
            if named is None:
                raise
            wishes[named].pop(0)


def _text_of(choice: Mapping[str, Any], url: str) -> str:
    text = choice.get("text")
    if not isinstance(text, str):
        raise EndpointError(
            f"{url} answers with something else than a completion; is it OpenAI-compatible?"
        )
    return text


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
