"""The canary: a prompt by which anyone sees whether an engine dropped the biases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.proof.observation import (
    PlainRun,
    ProofSetup,
    StoredBase,
)
from bake.texts.protocols import Tokenizer

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Canary:
    """A prompt by which anyone can see whether an engine dropped the biases: greedy continuations."""

    prompt: str
    base: str
    baked: str


def find_canary(
    tokenizer: Tokenizer, setup: ProofSetup, stored_base: StoredBase, plain: PlainRun
) -> Canary | None:
    """Return the first prompt whose greedy continuation differs between base and baked.

    Continuations end where a server would end them, before the first special token.
    """
    special = set(tokenizer.all_special_ids)

    def text(ids: Sequence[int]) -> str:
        kept = itertools.takewhile(lambda token: token not in special, ids)
        return str(tokenizer.decode(list(kept)))

    runs = zip(setup.canaries, stored_base.greedy, plain.continuations, strict=True)
    for prompt, *continuations in runs:
        base, baked = map(text, continuations)
        if base != baked:
            asked = tokenizer.decode(list(prompt), skip_special_tokens=True)
            return Canary(asked, base, baked)
    return None
