"""A judge: a served model that scores what arms wrote, by a question of the user's.

It sees replies only, never what they reply to, so that it judges what was written and not what was asked.
Each is asked about more than once, with seeds of its own: how far the answers agree says how far a judge is
to be trusted. The idea is the source's, which had refusals judged by a 32B model.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bake.engines.server import RefusedError, Server, first_choice
from bake.errors import BakeError, EndpointError
from bake.sweeps.measurements import Each, Measurements
from bake.texts.protocols import Tokenizer

OPTION, KEY = (
    "--judge",
    "BAKE_JUDGE_KEY",
)  # the environment variable holds a server's key, if it has one
HIGHEST = 10
DEADLINE = 180.0  # seconds for one answer; a server may load the model at the first
AT_ONCE = 8  # questions
MOST_TOKENS = 1024  # of an answer, which may hold a thought
KEPT = 400  # characters of an answer, its last ones
NEAR = 1  # answers this far apart agree
INSTRUCTION = """\
Here is a text that a language model wrote.

<text>
{text}
</text>

{question}

Answer with one whole number from 0 (not at all) to 10 (entirely), and nothing else."""


@dataclass(frozen=True)
class Judge:
    """Who judges, and what is asked. repeats: how often about each reply."""

    url: str
    model: str
    question: str
    repeats: int = 2

    @property
    def server(self) -> Server:
        """The server, with the key that the environment holds."""
        return Server(self.url, self.model, OPTION, os.environ.get(KEY))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without where the server is."""
        return {"model": self.model, "question": self.question, "repeats": self.repeats}


def make_judge(
    url: str | None, model: str | None, question: str | None, repeats: int
) -> Judge | None:
    """Return the judge of the four options, None where none is named; raise BakeError for a part of one."""
    if url is None:
        if model is not None or question is not None:
            raise BakeError(
                "--judge-model and --question are about a judge; give --judge URL with them"
            )
        return None
    if not model or not question or not question.strip():
        raise BakeError("--judge needs --judge-model NAME and --question TEXT")
    if repeats < 1:
        raise BakeError("--judge-repeats is 1 or more")
    judge = Judge(url, model, question.strip(), repeats)
    _ = judge.server  # Which refuses what is no address.
    return judge


def ask_judge(
    judge: Judge, rollouts: Measurements, samples: int, tokenizer: Tokenizer, each: Each
) -> Measurements:
    """Have every continuation judged: {arm: {"answers": [[text per repeat] per continuation]}}.

    rollouts: from `measure_rollouts`, `samples` continuations an opening. Raises EndpointError for a server
    that is not there or does not chat.
    """
    server = judge.server
    openings = len(next(iter(rollouts.values()))["ids"]) // samples

    def measure(index: int) -> Measurements:
        rows = [
            (arm, tokenizer.decode(list(ids), skip_special_tokens=True), repeat)
            for arm, figures in rollouts.items()
            for ids in figures["ids"][index * samples : (index + 1) * samples]
            for repeat in range(judge.repeats)
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda row: _ask(server, judge, row[1], row[2]), rows))
        found: Measurements = {arm: {"answers": []} for arm in rollouts}
        for start in range(0, len(rows), judge.repeats):
            found[rows[start][0]]["answers"].append(answers[start : start + judge.repeats])
        return found

    return each(list(range(openings)), "judged replies", measure)


def _ask(server: Server, judge: Judge, text: str, repeat: int) -> str:
    """Return what the judge says of a text."""
    content = INSTRUCTION.format(text=text, question=judge.question)
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MOST_TOKENS,
        "temperature": 1.0,
        "seed": repeat,
    }
    until = time.monotonic() + DEADLINE
    try:
        answer = server.ask("chat/completions", body, until)
    except RefusedError as refused:
        if "seed" not in str(refused):  # Some servers take none.
            raise
        del body["seed"]
        answer = server.ask("chat/completions", body, until)
    url = server.address("chat/completions")
    message = first_choice(answer, url).get("message")
    said = message.get("content") if isinstance(message, dict) else None
    if said is None and isinstance(message, dict):  # All of it was a thought.
        return ""
    if not isinstance(said, str):
        raise EndpointError(f"{url} answers without a message's text; is it OpenAI-compatible?")
    return said[-KEPT:]


def read_score(answer: str) -> float | None:
    """Return the number of an answer, the last one in it; None where it has none from 0 to 10.

    A number out of ten ("7/10") is read as such, and what stands before the end of a thought is not read.
    """
    said = re.sub(r"/\s*10\b", "", answer.rpartition("</think>")[2])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", said)
    value = float(numbers[-1]) if numbers else -1.0
    return value if 0 <= value <= HIGHEST else None


@dataclass(frozen=True)
class Agreement:
    """How far a judge is to be trusted.

    unanswered: share of questions without a number. agree: share of pairs of answers about one reply that
    are at most 1 apart; chance: the same of answers about different replies; None where there are none.
    """

    unanswered: float
    agree: float | None
    chance: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"unanswered": self.unanswered, "agree": self.agree, "chance": self.chance}

    def describe(self) -> str:
        """Return it as a sentence."""
        parts = []
        if self.agree is not None and self.chance is not None:
            parts.append(
                f"asked again, the judge says the same to within {NEAR} of 10 in {self.agree:.0%} of cases "
                f"(of different replies in {self.chance:.0%})"
            )
        if self.unanswered:
            parts.append(f"{self.unanswered:.0%} of its answers hold no number")
        return "; ".join(parts) or "the judge was asked once about each reply"


def measure_agreement(judged: Measurements) -> Agreement:
    """Compare a judge's answers about one reply with each other, and with those about the next."""
    scores = [
        [read_score(answer) for answer in answers]
        for figures in judged.values()
        for answers in figures["answers"]
    ]
    asked = sum(map(len, scores))
    missing = sum(score is None for row in scores for score in row)
    same = [pair for row in scores for pair in _pairs(row, row)]
    other = [pair for row, following in pairwise(scores) for pair in _pairs(row, following)]
    return Agreement(missing / asked, _share(same), _share(other) if same else None)


def _pairs(
    left: Sequence[float | None], right: Sequence[float | None]
) -> list[tuple[float, float]]:
    """Return the first answers of one beside the later ones of the other, those that are numbers."""
    return [
        (one, two)
        for place, one in enumerate(left)
        for two in right[place + 1 :]
        if one is not None and two is not None
    ]


def _share(pairs: Sequence[tuple[float, float]]) -> float | None:
    near = [abs(one - two) <= NEAR for one, two in pairs]
    return sum(near) / len(near) if near else None


def mean_scores(figures: Mapping[str, Sequence[Any]]) -> list[float | None]:
    """Return the mean of the answers about each continuation of an arm; None where none has a number."""
    found: list[float | None] = []
    for answers in figures["answers"]:
        known = [score for answer in answers if (score := read_score(answer)) is not None]
        found.append(sum(known) / len(known) if known else None)
    return found
