"""Batches of completions whose prompt is computed once: what goes together, and how it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.models.forward import LoadedModel
from bake.texts.pair_tokens import EncodedPair
from bake.texts.prompts import BATCH_TOKENS

if TYPE_CHECKING:
    import torch

CPU_TOKENS, GPU_TOKENS = 768, 8192
# Sharing pays when it saves this part of the tokens: a row with its own mask costs a little more.
SHARED_SHARE = 0.1
UNLIMITED = 10**9  # tokens: one forward, for a streamed model's weights move once for each
LONGEST_ROW = 4096  # tokens; the mask of a row grows with their square


@dataclass(frozen=True)
class SharedBatch:
    """Rows of prompt + positive + negative: (rows, positions), with a (rows, 1, positions, positions)
    mask that is added to attention scores."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor

    def inputs(self, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a model's forward."""
        return {
            "input_ids": self.input_ids.to(device),
            "attention_mask": self.attention_mask.to(device),
            "position_ids": self.position_ids.to(device),
        }


@dataclass(frozen=True)
class Reads:
    """Which (row, column) of a batch's activation goes to which text, with what weight."""

    texts: list[int]
    owners: torch.Tensor  # (reads,) places in `texts`
    rows: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor


def tokens_per_batch(loaded: LoadedModel) -> int:
    """A GPU wants many tokens at once, a CPU's cache few; streamed weights move once a forward."""
    if loaded.weights is not None:
        return BATCH_TOKENS
    return CPU_TOKENS if loaded.device.type == "cpu" else GPU_TOKENS


def row_length(pair: EncodedPair) -> int:
    return sum(len(text.ids) for text in pair.texts) - pair.shared


def longest(pairs: Sequence[EncodedPair], chosen: Sequence[int]) -> list[int]:
    """Return the pair with the longest text, which a window cuts first, and that with the longest row."""
    text = max(chosen, key=lambda i: max(len(text.ids) for text in pairs[i].texts))
    row = max(chosen, key=lambda i: row_length(pairs[i]))
    return sorted({text, row})


def saves(pair: EncodedPair) -> bool:
    """Tell whether sharing is worth a mask of its own; a very long row's mask would not fit."""
    tokens = sum(len(text.ids) for text in pair.texts)
    return pair.shared >= SHARED_SHARE * tokens and tokens - pair.shared <= LONGEST_ROW


def make_reads(
    owners: Sequence[int], rows: Sequence[int], columns: Sequence[tuple[int, ...]]
) -> Reads:
    import torch

    flat = [
        (place, row, column, 1.0 / len(chosen))
        for place, (row, chosen) in enumerate(zip(rows, columns, strict=True))
        for column in chosen
    ]
    places, all_rows, all_columns, weights = zip(*flat, strict=True)
    return Reads(
        list(owners),
        torch.tensor(places),
        torch.tensor(all_rows),
        torch.tensor(all_columns),
        torch.tensor(weights, dtype=torch.float64),
    )


def pack(pairs: Sequence[EncodedPair], dtype: torch.dtype) -> SharedBatch:
    import torch

    width = max(row_length(pair) for pair in pairs)
    input_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    position_ids = torch.zeros(len(pairs), width, dtype=torch.long)
    visible = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
    for row, pair in enumerate(pairs):
        first, second = (text.ids for text in pair.texts)
        end, length = len(first), row_length(pair)
        input_ids[row, :length] = torch.tensor([*first, *second[pair.shared :]])
        position_ids[row, :end] = torch.arange(end)
        position_ids[row, end:length] = torch.arange(pair.shared, len(second))
        visible[row, end:, pair.shared : end] = False
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    return SharedBatch(input_ids, mask[:, None], position_ids)
