"""What the base and the bake write: a few openings, continued greedily by both."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bake.io.shipped import OPENINGS, REQUESTS
from bake.texts.chats import encode_requests
from bake.texts.prompts import encode, read_prompts
from bake.texts.protocols import Tokenizer
from bake.texts.rendering import has_template

SAMPLES = 3


@dataclass(frozen=True)
class Opening:
    """What is to be continued: its text, and its ids as the model is given them."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """An opening, or a request where there is a chat template, and what base and bake write after it."""

    opening: str
    base: str
    baked: str


def choose_openings(tokenizer: Tokenizer) -> tuple[Opening, ...]:
    """Return a few shipped openings that have the same number of tokens, so that they share a batch."""
    texts = read_prompts(REQUESTS if has_template(tokenizer) else OPENINGS)
    ids = (
        encode_requests(tokenizer, texts)
        if has_template(tokenizer)
        else [_without_end(tokenizer, text.ids) for text in encode(tokenizer, texts)]
    )
    counts = Counter(map(len, ids))
    length = max(counts, key=lambda length: (min(counts[length], SAMPLES), -length))
    chosen = [
        Opening(text, found) for text, found in zip(texts, ids, strict=True) if len(found) == length
    ]
    return tuple(chosen[:SAMPLES])


def collect_samples(
    tokenizer: Tokenizer,
    openings: Sequence[Opening],
    base: Sequence[Sequence[int]],
    baked: Sequence[Sequence[int]],
) -> tuple[Sample, ...]:
    """Return what was written, each up to the first special token."""
    written = zip(openings, base, baked, strict=True) if base and baked else ()
    return tuple(
        Sample(opening.text, decode_written(tokenizer, before), decode_written(tokenizer, after))
        for opening, before, after in written
    )


def decode_written(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return text up to the first special token, where a server would end it."""
    special = set(tokenizer.all_special_ids)
    return str(tokenizer.decode(list(itertools.takewhile(lambda token: token not in special, ids))))


def _without_end(tokenizer: Tokenizer, ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
