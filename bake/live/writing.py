"""Prompts continued under several pushes side by side, token by token, with what each strays from the base.

All that stand at the same place go through in one batch, and share their noise, so that what differs is the
push. Beside every steered row the base reads the same tokens: how far apart the two are is known as soon as
a token is there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError, PromptError
from bake.models.forward import Decoding, LanguageModel
from bake.models.generation import check_seed, draw_noise
from bake.sweeps.arms import Arm, steered_rows
from bake.sweeps.design import BASE

if TYPE_CHECKING:
    import torch

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Style:
    """How text is sampled. temperature: 0 takes the likeliest token each time."""

    new_tokens: int = 60
    temperature: float = 0.7
    seed: int = 0

    def check(self) -> None:
        """Raise BakeError for a value that nothing can be sampled with."""
        if self.new_tokens < 1:
            raise BakeError(f"--new-tokens {self.new_tokens}: give a number from 1")
        if not 0 <= self.temperature < math.inf:
            raise BakeError(
                f"--temperature {self.temperature:g}: give a number from 0, such as 0.7"
            )
        check_seed(self.seed)


@dataclass(frozen=True)
class Voice:
    """One side of a comparison: a model in memory, and the push that it has there."""

    arm: Arm
    loaded: LanguageModel

    @property
    def name(self) -> str:
        """What its column is called."""
        return self.arm.name

    @property
    def is_base(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.arm.kind == "base" and self.arm.name == BASE


@dataclass(frozen=True)
class Continuation:
    """What a voice has written so far.

    nats: of all its tokens under the base. divergence: the sum of KL(voice ‖ base) at each of them, nats.
    done: whether it came to an end, or to the last token that was asked for.
    """

    voice: Voice
    tokens: Tokens = ()
    text: str = ""
    nats: float = 0.0
    divergence: float = 0.0
    done: bool = False

    @property
    def kl(self) -> float | None:
        """KL(voice ‖ base) a token of its own text, nats; None before the first."""
        return self.divergence / len(self.tokens) if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """The base's perplexity of the text; None before the first token."""
        return math.exp(min(self.nats / len(self.tokens), 700.0)) if self.tokens else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "name": self.voice.name,
            "multiplier": self.voice.arm.multiplier,
            "text": self.text,
            "tokens": len(self.tokens),
            "kl": _finite(self.kl),
            "perplexity": _finite(self.perplexity),
        }


def _finite(value: float | None) -> float | None:
    """Return a number that JSON can hold: a push from which nothing comes back has none."""
    return value if value is not None and math.isfinite(value) else None


class _Group:
    """Rows of one model and one length, which go through in one batch."""

    def __init__(self, loaded: LanguageModel) -> None:
        self.loaded = loaded
        self.arms: list[Arm] = []
        self.prompts: list[Tokens] = []
        self._decoding: Decoding | None = None

    def add(self, arm: Arm, prompt: Tokens) -> int:
        self.arms.append(arm)
        self.prompts.append(prompt)
        return len(self.arms) - 1

    def logits(self, new_tokens: int) -> torch.Tensor:
        import torch

        if self._decoding is None:
            self._decoding = Decoding(self.loaded, torch.tensor(self.prompts), new_tokens)
        with steered_rows(self.loaded, self.arms):
            return self._decoding.logits()

    def append(self, picked: Sequence[int]) -> None:
        import torch

        assert self._decoding is not None
        self._decoding.append(torch.tensor(list(picked)))


def write(
    base: LanguageModel,
    voices: Sequence[Voice],
    prompts: Sequence[Tokens],
    style: Style,
    *,
    number: int = 0,
) -> Iterator[tuple[Continuation, ...]]:
    """Yield what every voice has written, after each token, until all are done.

    prompts: each voice's own. number: which prompt of a session it is; it draws other noise. Raises
    PromptError for a prompt without a token, or too long for the model's positions.
    """
    if not all(prompts):
        raise PromptError("a prompt has no token to continue; write a word")
    ends = end_tokens(base)
    groups: dict[tuple[int, int], _Group] = {}
    rows: list[tuple[_Group, int]] = []
    shadows: list[tuple[_Group, int]] = []

    def place(loaded: LanguageModel, arm: Arm, prompt: Tokens) -> tuple[_Group, int]:
        group = groups.setdefault((id(loaded), len(prompt)), _Group(loaded))
        return group, group.add(arm, prompt)

    for voice, prompt in zip(voices, prompts, strict=True):
        rows.append(place(voice.loaded, voice.arm, prompt))
        shadows.append(rows[-1] if voice.is_base else place(base, Arm(BASE, "base"), prompt))
    found = [Continuation(voice) for voice in voices]
    for step in range(style.new_tokens):
        logits = {id(group): group.logits(style.new_tokens) for group in groups.values()}
        own = [logits[id(group)][row].log_softmax(-1) for group, row in rows]
        base_logs = [logits[id(group)][row].log_softmax(-1) for group, row in shadows]
        picked = [_choose(logs, style, number, step) for logs in own]
        for index, (logs, under_base, token) in enumerate(zip(own, base_logs, picked, strict=True)):
            if not found[index].done:
                found[index] = _grow(found[index], logs, under_base, token, ends)
        if step + 1 == style.new_tokens:
            found = [replace(each, done=True) for each in found]
        yield tuple(found)
        if all(each.done for each in found):
            return
        following: dict[int, dict[int, int]] = {}
        for places in (rows, shadows):
            for (group, row), token in zip(places, picked, strict=True):
                following.setdefault(id(group), {})[row] = token
        for group in groups.values():
            group.append([token for _, token in sorted(following[id(group)].items())])


def _choose(logs: torch.Tensor, style: Style, number: int, step: int) -> int:
    """Return a token drawn by noise that all voices share: argmax(log p / temperature + Gumbel noise)."""
    if style.temperature == 0:
        return int(logs.argmax())
    noise = draw_noise(style.seed, number, 0, step, logs.shape[-1])
    return int((logs / style.temperature + noise).argmax())


def _grow(
    found: Continuation,
    logs: torch.Tensor,
    under_base: torch.Tensor,
    token: int,
    ends: frozenset[int],
) -> Continuation:
    """Return a continuation with one token more; a token that ends it is not counted."""
    if token in ends:
        return replace(found, done=True)
    tokens = (*found.tokens, token)
    # A push from which nothing comes back has no finite log-probabilities: what is nan stays nan.
    divergence = float((logs.exp() * (logs - under_base)).sum())
    return replace(
        found,
        tokens=tokens,
        text=_decode(found.voice.loaded, tokens),
        nats=found.nats - float(under_base[token]),
        divergence=found.divergence + max(divergence, 0.0),
    )


def _decode(loaded: LanguageModel, tokens: Tokens) -> str:
    """Return the text of tokens, without a character of which not all bytes are there yet."""
    return loaded.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def end_tokens(loaded: LanguageModel) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the generation config."""
    configured = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    named = [*configured] if isinstance(configured, list | tuple) else [configured]
    named.append(getattr(loaded.tokenizer, "eos_token_id", None))
    return frozenset(token for token in named if isinstance(token, int))
