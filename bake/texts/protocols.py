"""What bake asks of transformers' objects: a tokenizer or a config of any class that answers so will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A tokenizer, as transformers' are."""

    @property
    def is_fast(self) -> bool:
        """Whether it tells which characters a token stands for."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        ...

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Tokens that stand for no text, such as the beginning of a sequence."""
        ...

    @property
    def all_special_tokens(self) -> Sequence[str]:
        """Their names."""
        ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """{what a special token is for: its name}."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """{token: what was added under it}."""
        ...

    @property
    def chat_template(self) -> Any:
        """The Jinja template of a conversation, or {name: template}; None for a base model's."""
        ...

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Encode one text or several: {"input_ids": …}, with more by `options`."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Return the text of tokens."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the vocabulary's entries of tokens."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Return {entry: token}."""
        ...

    def __len__(self) -> int:
        """Return the size of the vocabulary, added tokens included."""
        ...


class Config(Protocol):
    """A model's configuration, as transformers' are; of a multimodal model, that of all its parts."""

    def get_text_config(self) -> Any:
        """Return the configuration of the part that reads and writes text."""
        ...
