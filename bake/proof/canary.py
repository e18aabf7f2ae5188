"""The canary: prompts by which anyone sees whether an engine dropped the biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.proof.observation import (
    PlainRun,
    ProofSetup,
    Reference,
    StoredBase,
)
from bake.proof.samples import decode_written
from bake.texts.protocols import Tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Canary:
    """A prompt by which anyone can see whether an engine dropped the biases: greedy continuations."""

    prompt: str
    base: str
    baked: str


def find_canary(
    tokenizer: Tokenizer, setup: ProofSetup, stored_base: StoredBase, plain: PlainRun
) -> Canary | None:
    """Return the first prompt whose greedy continuation differs between base and baked."""
    runs = zip(setup.canaries, stored_base.greedy, plain.continuations, strict=True)
    for prompt, *continuations in runs:
        base, baked = (decode_written(tokenizer, ids) for ids in continuations)
        if base != baked:
            asked = tokenizer.decode(list(prompt), skip_special_tokens=True)
            return Canary(asked, base, baked)
    return None


FORKS, FORKS_A_TEXT, FIRST = 12, 3, 4  # how many, of one text, and from which token on


@dataclass(frozen=True)
class Fork:
    """A text after which base and bake go on with different tokens.

    margin: nats by which either prefers its token to every other, of both the smaller: what quantisation
    has to move before the answer is another. tilt_base, tilt_baked: nats by which each has the bake's token
    before the base's, negative and positive: what a server that tells log-probabilities is held against.
    """

    prompt: str
    base: str
    baked: str
    margin: float
    tilt_base: float
    tilt_baked: float


def find_forks(tokenizer: Tokenizer, setup: ProofSetup, reference: Reference) -> tuple[Fork, ...]:
    """Return the surest places of the proof's texts at which base and bake part, by their margin.

    Only places whose text comes back as the same tokens, and tokens of which neither begins the other: a
    server is given text and gives text.
    """
    places: list[tuple[float, int, int, int, int]] = []
    runs = list(zip(setup.encoded, reference.base, reference.hooked, strict=True))
    for number, (text, base, hooked) in enumerate(runs):
        if len(base) != len(text.ids):
            continue
        old, new = base.float().argmax(-1), hooked.float().argmax(-1)
        for place in (old != new).nonzero()[:, 0].tolist():
            own, other = int(new[place]), int(old[place])
            margin = min(_lead(hooked[place]), _lead(base[place]))
            places.append((margin, number, place, other, own))
    found: list[Fork] = []
    taken: dict[int, int] = {}
    for margin, number, place, other, own in sorted(places, reverse=True):
        if len(found) == FORKS:
            break
        if place < FIRST or taken.get(number, 0) == FORKS_A_TEXT:
            continue
        texts = _as_text(tokenizer, setup.encoded[number].ids[: place + 1], other, own)
        if texts is not None:
            _, base, hooked = runs[number]
            tilts = (round(float(row[place, own] - row[place, other]), 3) for row in (base, hooked))
            found.append(Fork(*texts, round(margin, 3), *tilts))
            taken[number] = taken.get(number, 0) + 1
    return tuple(found)


def _lead(logits: torch.Tensor) -> float:
    """Return how far the most likely token is before the next, in nats."""
    first, second = logits.float().topk(2).values.tolist()
    return float(first - second)


def _as_text(
    tokenizer: Tokenizer, ids: tuple[int, ...], base: int, baked: int
) -> tuple[str, str, str] | None:
    """Return prompt, the base's and the bake's token as text; None where a server could not tell them."""
    prompt = tokenizer.decode(list(ids), skip_special_tokens=True)
    old, new = (tokenizer.decode([each], skip_special_tokens=True) for each in (base, baked))
    plain = [text.strip() for text in (old, new)]
    if not all(plain) or plain[0].startswith(plain[1]) or plain[1].startswith(plain[0]):
        return None
    if not (old + new).isprintable() or tuple(tokenizer(prompt)["input_ids"]) != tuple(ids):
        return None
    return prompt, old, new
