"""The canary: a prompt by which anyone sees whether an engine dropped the biases."""

from __future__ import annotations

from dataclasses import dataclass

from bake.proof.observation import (
    PlainRun,
    ProofSetup,
    StoredBase,
)
from bake.proof.samples import decode_written
from bake.texts.protocols import Tokenizer


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
