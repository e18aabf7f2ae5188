"""A conversation with several voices at once: each has its own replies, all are asked the same."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from bake.live.writing import Continuation, Style, Tokens, Voice, write
from bake.models.forward import LanguageModel
from bake.sweeps.measurements import encode_openings
from bake.texts.pair_tokens import is_templated
from bake.texts.prompts import encode
from bake.texts.rendering import Conversation, Message, render


@dataclass
class Talk:
    """Voices, and what was said to them so far; without a chat template every prompt begins anew.

    base: what the others are compared with. system: a system message for every voice, where the chat
    template takes one.
    """

    base: LanguageModel
    voices: Sequence[Voice]
    style: Style = field(default_factory=Style)
    chat_template: str = "auto"
    system: str | None = None
    number: int = 0
    _said: list[list[Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    @property
    def is_chat(self) -> bool:
        """Whether prompts are a user's messages; else they are text to be continued."""
        return is_templated(self.base.tokenizer, self.chat_template)

    def reset(self, voices: Sequence[Voice] | None = None) -> None:
        """Forget what was said; go on with other voices where they are given."""
        self.voices = self.voices if voices is None else voices
        opened: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self._said = [list(opened) for _ in self.voices]

    def recall(self, said: Sequence[Sequence[Message]]) -> None:
        """Go on from what was said before: each voice's messages."""
        self._said = [[*own, *before] for own, before in zip(self._said, said, strict=True)]

    def ask(self, text: str) -> Generator[tuple[Continuation, ...]]:
        """Say something; yield what every voice has answered so far, after each token.

        What was answered until a caller stops listening is what was said. Raises PromptError as `write`.
        """
        prompts = self._encode(text)
        number, self.number = self.number, self.number + 1
        answers: tuple[Continuation, ...] = ()
        try:
            for answers in write(self.base, self.voices, prompts, self.style, number=number):
                yield answers
        finally:
            if self.is_chat and all(answer.text for answer in answers) and answers:
                for said, answer in zip(self._said, answers, strict=True):
                    said += [
                        {"role": "user", "content": text},
                        {"role": "assistant", "content": answer.text},
                    ]

    def _encode(self, text: str) -> list[Tokens]:
        tokenizer = self.base.tokenizer
        if not self.is_chat:
            return encode_openings(tokenizer, [text], "never") * len(self.voices)
        name = f"the prompt {text[:40]!r}"
        asked = [(*said, {"role": "user", "content": text}) for said in self._said]
        distinct = list(dict.fromkeys(map(_frozen, asked)))
        conversations = [Conversation(_thawed(each), True, name) for each in distinct]
        texts = render(tokenizer, conversations).texts
        encoded = encode(tokenizer, texts, None, special_tokens=False)
        tokens = {each: entry.ids for each, entry in zip(distinct, encoded, strict=True)}
        return [tokens[_frozen(each)] for each in asked]


def _frozen(messages: Sequence[Message]) -> tuple[tuple[tuple[str, str], ...], ...]:
    return tuple(tuple(message.items()) for message in messages)


def _thawed(frozen: tuple[tuple[tuple[str, str], ...], ...]) -> tuple[Message, ...]:
    return tuple(dict(message) for message in frozen)
