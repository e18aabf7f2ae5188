"""Text in: prompt files → token batches with content mask and positions.

The content mask says which tokens are measured: not padding, not position 0, not special tokens.
Beginning-of-sequence and delimiter tokens carry norms 10-1000 times the rest (massive activations,
arXiv 2402.17762) and would decide every mean. Padding is done here, not by the tokenizer, so that a
tokenizer without a padding token works and nothing depends on its padding side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import CheckpointError, PromptError
from bake.progress import announce
from bake.resources import find_set, shipped_sets

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 512  # per prompt; longer prompts are cut, because norms settle long before
BATCH_TOKENS = 2048  # per forward, padding included


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
    """Read a prompt file or shipped set: JSONL with a "text" key each line, or plain text, one a line.

    Raises PromptError for a missing file, a malformed line, or a file without a prompt.
    """
    path = find_set(str(name), "prompts")
    if path is None:
        known = ", ".join(shipped_sets("prompts"))
        raise PromptError(f"no prompt file or set {str(name)!r}; give a file or one of: {known}")
    if path.suffix in (".jsonl", ".json"):
        texts = [_field(row, "text", path, number) for number, row in read_jsonl(path)]
    else:
        texts = [line for line in read_text(path).split("\n") if line.strip()]
    if not texts:
        raise PromptError(f'{path} holds no prompts; write one a line, as text or as {{"text": …}}')
    return texts


def identify_prompts(name: str | Path, texts: Sequence[str]) -> dict[str, str | None]:
    """Return what tells a prompt file's texts from others without naming a path.

    "set": its name where it ships with bake; "sha256": of the texts.
    """
    known = shipped_sets("prompts").get(str(name))
    ships = known is not None and find_set(str(name), "prompts") == known
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return {"set": str(name) if ships else None, "sha256": digest}


def batch_prompts(tokenizer: Any, texts: Sequence[str], config: Any) -> list[TokenBatch]:
    """Encode texts, as far as a model of this config has positions, and group them into batches."""
    return make_batches(encode(tokenizer, texts, limit=position_limit(config)))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file; raise PromptError at a line that is no object."""
    # Lines end at line feeds only: JSON strings may hold the other separators that splitlines knows.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}:{number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}:{number} is not a JSON object")
        yield number, row


def _field(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise PromptError(f"{path}:{number} has no {key!r} string")
    return value


def read_text(path: Path) -> str:
    """Return a file's text, line ends as line feeds, without the mark that editors of Windows put first."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} cannot be read as UTF-8 text: {error}; save it so") from None


def load_tokenizer(directory: Path) -> Any:
    """Load the checkpoint's own tokenizer. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{directory.name} has no tokenizer that transformers can load ({reason}); bake needs it to "
            f"run prompts: put the tokenizer's files into the directory"
        ) from None


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    max_tokens: int | None = MAX_TOKENS,
    *,
    limit: int | None = None,
    special_tokens: bool = True,
) -> list[Encoded]:
    """Tokenise texts as the model expects them; longer ones are cut at their end.

    max_tokens: what is wanted of a text; None keeps all of it. limit: the positions that the model has
    (see `position_limit`); texts cut because of it are announced. special_tokens: whether the
    tokenizer puts its own around the text, which a rendered chat template already has.
    """
    caps = [cap for cap in (max_tokens, limit) if cap is not None]
    options: dict[str, Any] = {"truncation": True, "max_length": min(caps)} if caps else {}
    encoded = _tokenise(tokenizer, texts, add_special_tokens=special_tokens, **options)
    if limit is not None and limit == min(caps):
        full = [text for text, cut in zip(texts, encoded, strict=True) if len(cut.ids) == limit]
        lengths = [len(text.ids) for text in _tokenise(tokenizer, full)]
        cut = sum(length > limit for length in lengths)
        if cut:
            announce(f"{cut} of {len(texts)} texts cut to the model's {limit} positions")
    return encoded


def _tokenise(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[Encoded]:
    if not texts:
        return []
    special = special_ids(tokenizer)
    result = tokenizer(
        list(texts), return_offsets_mapping=bool(tokenizer.is_fast), verbose=False, **options
    )
    offsets = result.get("offset_mapping") or [[(0, 0)] * len(ids) for ids in result["input_ids"]]
    return [
        Encoded(
            tuple(ids),
            tuple(position > 0 and token not in special for position, token in enumerate(ids)),
            tuple((int(start), int(stop)) for start, stop in places),
        )
        for ids, places in zip(result["input_ids"], offsets, strict=True)
    ]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return every token id that is no content: chat-template tokens are special without a name."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


def position_limit(config: Any) -> int | None:
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
