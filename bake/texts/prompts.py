"""Text in: prompt files → token batches with content mask and positions.

The content mask says which tokens are measured: not padding, not position 0, not special tokens.
Beginning-of-sequence and delimiter tokens carry norms 10-1000 times the rest (massive activations,
arXiv 2402.17762) and would decide every mean. Padding is done here, not by the tokenizer, so that a
tokenizer without a padding token works and nothing depends on its padding side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from bake.checkpoint import pretrained
from bake.errors import BakeError, CheckpointError, PromptError
from bake.io.shipped import find_set, shipped_sets
from bake.support.progress import announce
from bake.support.text import did_you_mean, explain_briefly, one_line
from bake.texts.protocols import Config, Tokenizer
from bake.texts.rows import read_rows, read_text
from bake.texts.shapes import read_prompt_rows

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512  # per prompt; longer prompts are cut, because norms settle long before
BATCH_TOKENS = 2048  # per forward, padding included

# {tokenizer: rows of the embedding of the model that it was loaded with}
_EMBEDDINGS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Encoded:
    """One text as token ids, which of them are content, and where in the text each one lies.

    offsets: (start, stop) characters of each token; (0, 0) for tokens that the tokenizer added.
    """

    ids: tuple[int, ...]
    content: tuple[bool, ...]
    offsets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch: every tensor is (texts, positions); `indices` are the texts' places in the set.

    position_ids: None leaves them to the model.
    """

    indices: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    content_mask: torch.Tensor

    def inputs(self, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a model's forward."""
        tensors = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }
        return {name: values.to(device) for name, values in tensors.items() if values is not None}


def read_prompts(name: str | Path) -> list[str]:
    """Read a prompt file or shipped set: plain text, one a line, or JSON, rows or an array.

    A row is a text, or an object whose text stands under "text", or else under one of the keys that
    others use ("prompt", "content", "messages", …), which is announced. Raises PromptError for a missing
    file, a malformed line, or a file without a prompt.
    """
    path = find_set(str(name), "prompts")
    if path is None:
        known = shipped_sets("prompts")
        hint = did_you_mean(name, known) or f"; give a file or one of: {', '.join(known)}"
        raise PromptError(f"no prompt file or set {str(name)!r}{hint}")
    if path.suffix in (".jsonl", ".json"):
        texts = read_prompt_rows(read_rows(path), announce)
    else:
        texts = [line for line in read_text(path).split("\n") if line.strip()]
    if not texts:
        raise PromptError(f'{path} holds no prompts; write one a line, as text or as {{"text": …}}')
    return texts


def read_words(path: Path) -> frozenset[str]:
    """Read target words, one a line, `#` comments allowed; raise PromptError where there are none."""
    words = {line.partition("#")[0].strip().lower() for line in read_text(path).splitlines()} - {""}
    if not words:
        raise PromptError(f"{path} holds no words; write one a line")
    return frozenset(words)


def identify_prompts(name: str | Path, texts: Sequence[str]) -> dict[str, str | None]:
    """Return what tells a prompt file's texts from others without naming a path.

    "set": its name where it ships with bake; "sha256": of the texts.
    """
    known = shipped_sets("prompts").get(str(name))
    ships = known is not None and find_set(str(name), "prompts") == known
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {"set": str(name) if ships else None, "sha256": digest}


def batch_prompts(tokenizer: Tokenizer, texts: Sequence[str], config: Config) -> list[TokenBatch]:
    """Encode texts, as far as a model of this config has positions, and group them into batches."""
    return make_batches(encode(tokenizer, texts, limit=position_limit(config)))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the checkpoint's own tokenizer.

    Raises CheckpointError where there is none, where it is broken, and where its tokens go beyond the
    embedding of the model in the same directory.
    """
    with _failures_of("has no tokenizer that transformers can load", directory.name):
        tokenizer: Tokenizer = pretrained.load_tokenizer(directory)
    rows = _embedding_rows(directory)
    if rows is not None:
        _EMBEDDINGS[tokenizer] = rows
        _check_vocabulary(tokenizer, directory.name, rows)
    return tokenizer


@contextmanager
def _failures_of(what: str, name: str) -> Iterator[None]:
    """Tell in one line what a tokenizer of others raised, panics of the tokenizers library included."""
    try:
        yield
    except BakeError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Somebody wants to stop.
        raise CheckpointError(
            f"{name} {what} ({explain_briefly(error)}); bake needs it to run prompts: put the "
            "tokenizer's own files into the directory"
        ) from None


def _embedding_rows(directory: Path) -> int | None:
    """Return how many tokens the model in a directory knows; None where its config does not say."""
    if not (directory / "config.json").is_file():
        return None
    try:
        config = pretrained.load_config(directory)
        rows = getattr(config.get_text_config(), "vocab_size", None)
    except Exception:  # What is wrong with a config is told where it is read.
        return None
    return rows if isinstance(rows, int) and rows > 0 else None


def _check_vocabulary(tokenizer: Tokenizer, name: str, rows: int) -> None:
    """Raise CheckpointError where ordinary tokens go beyond the embedding; say it of added ones.

    Gemma 3 has an added token for images that its text models have no row for.
    """
    with _failures_of("has a tokenizer whose vocabulary cannot be read", name):
        ids = tokenizer.get_vocab()
        added = set(tokenizer.added_tokens_decoder)
        beyond = {index: token for token, index in ids.items() if index >= rows}
    if not beyond:
        return
    size = max(beyond) + 1
    if not beyond.keys() <= added:
        raise CheckpointError(
            f"{name}: the tokenizer has {size} tokens and the model's embedding {rows} rows, so they do "
            "not belong together; put the model's own tokenizer files into the directory"
        )
    first = one_line(beyond[min(beyond)], 40)
    announce(
        f"{name}: the tokenizer has {size} tokens with those that were added to it and the model's "
        f"embedding {rows} rows; a text with {first} cannot be run"
    )


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_tokens: int | None = MAX_TOKENS,
    *,
    limit: int | None = None,
    special_tokens: bool = True,
) -> list[Encoded]:
    """Tokenise texts as the model expects them; longer ones are cut at their end.

    max_tokens: what is wanted of a text; None keeps all of it. limit: the positions that the model has
    (see `position_limit`); texts cut because of it are announced. special_tokens: whether the
    tokenizer puts its own around the text, which a rendered chat template already has; a text that
    begins with them gets no others. Raises CheckpointError for a token that the model has no row for.
    """
    caps = [cap for cap in (max_tokens, limit) if cap is not None]
    options: dict[str, Any] = {"truncation": True, "max_length": min(caps)} if caps else {}
    encoded = _tokenise(tokenizer, texts, special_tokens, **options)
    if limit is not None and limit == min(caps):
        full = [text for text, cut in zip(texts, encoded, strict=True) if len(cut.ids) == limit]
        lengths = [len(text.ids) for text in _tokenise(tokenizer, full, special_tokens)]
        cut = sum(length > limit for length in lengths)
        if cut:
            announce(f"{cut} of {len(texts)} texts cut to the model's {limit} positions")
    return encoded


def without_prefix(tokenizer: Tokenizer, text: str) -> str:
    """Return a text without the special tokens that it begins with and the tokenizer puts there anyway.

    They are what the tokenizer puts before a text, mostly one that marks the beginning (BOS).
    """
    return text.removeprefix(_prefix_of(tokenizer, [text]))


def _prefix_of(tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Return the special tokens that the tokenizer puts before a text, where one of `texts` has them."""
    if not any(text.startswith(tuple(tokenizer.all_special_tokens)) for text in texts):
        return ""
    (ids,) = tokenizer(["a"], return_offsets_mapping=False, verbose=False)["input_ids"]
    leading = takewhile(special_ids(tokenizer).__contains__, ids)
    return "".join(tokenizer.convert_ids_to_tokens(list(leading)))


def _tokenise(
    tokenizer: Tokenizer, texts: Sequence[str], special_tokens: bool, **options: Any
) -> list[Encoded]:
    if not texts:
        return []
    rows = _EMBEDDINGS.get(tokenizer)
    with _failures_of("has a tokenizer that fails", "the model"):
        special = special_ids(tokenizer)
        prefix = _prefix_of(tokenizer, texts) if special_tokens else ""
        result = tokenizer(
            [text.removeprefix(prefix) for text in texts],
            add_special_tokens=special_tokens,
            return_offsets_mapping=bool(tokenizer.is_fast),
            verbose=False,
            **options,
        )
    offsets = result.get("offset_mapping") or [[(0, 0)] * len(ids) for ids in result["input_ids"]]
    encoded = []
    for text, ids, places in zip(texts, result["input_ids"], offsets, strict=True):
        if rows is not None and max(ids, default=0) >= rows:
            token = one_line(tokenizer.convert_ids_to_tokens(max(ids)), 40)
            raise CheckpointError(
                f"the tokenizer makes token {max(ids)} ({token}) of {text[:40]!r} and the model's "
                f"embedding has {rows} rows: put the model's own tokenizer files beside it"
            )
        # Offsets count in the text as it was given.
        shift = len(prefix) if prefix and text.startswith(prefix) else 0
        encoded.append(
            Encoded(
                tuple(ids),
                tuple(position > 0 and token not in special for position, token in enumerate(ids)),
                tuple(
                    (int(start) + shift, int(stop) + shift) if stop else (0, 0)
                    for start, stop in places
                ),
            )
        )
    return encoded


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return every token id that is no content: chat-template tokens are special without a name."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def position_limit(config: Config) -> int | None:
    """Return how many positions a model has, which learned ones cannot exceed; None where it says none."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def make_batches(
    encoded: Sequence[Encoded], *, batch_tokens: int = BATCH_TOKENS, padding_side: str = "right"
) -> list[TokenBatch]:
    """Group texts of like length into padded batches of at most `batch_tokens` tokens.

    Position ids count from 0 at each text's first token on either padding side, without which
    learned positions shift under left padding. Empty texts are left out.
    """
    order = sorted(
        (index for index, text in enumerate(encoded) if text.ids),
        key=lambda index: (len(encoded[index].ids), index),
    )
    groups: list[list[int]] = []
    for index in order:
        width = len(encoded[index].ids)
        if groups and (len(groups[-1]) + 1) * width <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_pad(encoded, group, padding_side) for group in groups]


def _pad(encoded: Sequence[Encoded], indices: Sequence[int], padding_side: str) -> TokenBatch:
    import torch

    width = max(len(encoded[index].ids) for index in indices)
    shape = (len(indices), width)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    content_mask = torch.zeros(shape, dtype=torch.bool)
    for row, index in enumerate(indices):
        text = encoded[index]
        length = len(text.ids)
        place = slice(width - length, width) if padding_side == "left" else slice(0, length)
        input_ids[row, place] = torch.tensor(text.ids)
        attention_mask[row, place] = 1
        position_ids[row, place] = torch.arange(length)
        content_mask[row, place] = torch.tensor(text.content)
    return TokenBatch(tuple(indices), input_ids, attention_mask, position_ids, content_mask)
