"""Padded batches: texts of unlike length run together, as batched generation and servers run them.

A bias fires at padded positions too. Attention masks them; a convolution or a recurrent block may carry
what they hold into real tokens, where the hooked model, whose push is at the texts' own tokens, has
nothing of it. Here the batches are made and the runs compared; what they mean is for the two proofs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bake.texts.prompts import Encoded, TokenBatch, make_batches

if TYPE_CHECKING:
    import torch
    from torch import nn

TEXTS = 4
CAUSE = (
    "a bias there fires at padded positions, and the convolution or recurrence behind it carries it "
    "into the first real tokens"
)


@dataclass(frozen=True)
class PaddingError:
    """What one way of padding does at real tokens, in the units of whoever measured.

    error: max|bake, padded − alone|. base_error: max|hooked base, padded − alone|, the push at real
    tokens only: what the base does by itself. leak: max|bake − hooked base|, both padded.
    """

    error: float
    base_error: float
    leak: float

    def is_beyond(self, tolerance: float) -> bool:
        """Whether the bake leaks more than a tolerance, and more than the base's own; NaN is beyond."""
        return not (self.leak <= tolerance or self.leak <= self.base_error)


@dataclass(frozen=True)
class PaddingTrial:
    """Batches to compare: each text alone, and {how they are padded: all of them in one batch}."""

    alone: tuple[TokenBatch, ...]
    padded: dict[str, TokenBatch]


def plan_trial(model: nn.Module, texts: Sequence[Sequence[int]]) -> PaddingTrial:
    """Return up to four texts, the longest whole and others cut shorter, alone and padded.

    Padded batches have the position ids that `generate` derives from the mask, where the model's forward
    takes them; on the left there is also the mask alone, from which some models derive their own.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    encoded = [Encoded(ids, (True,) * len(ids), ((0, 0),) * len(ids)) for ids in _stagger(texts)]
    everything = sum(len(text.ids) for text in encoded) * len(encoded)
    padded = {}
    for side in ("right", "left"):
        (batch,) = make_batches(encoded, batch_tokens=everything, padding_side=side)
        padded[side] = batch if takes_positions else replace(batch, position_ids=None)
    if takes_positions:
        padded["left, mask only"] = replace(padded["left"], position_ids=None)
    alone = (
        replace(batch, position_ids=None)
        for text in encoded
        for batch in make_batches([text], batch_tokens=1)
    )
    return PaddingTrial(
        tuple(replace(batch, indices=(index,)) for index, batch in enumerate(alone)), padded
    )


def _stagger(texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the longest text, and others cut to three quarters, a half and a quarter of its length."""
    first = max(range(len(texts)), key=lambda index: len(texts[index]))
    width = len(texts[first])
    others = [text for index, text in enumerate(texts) if index != first] or [texts[first]]
    lengths = dict.fromkeys(max(1, width * part // TEXTS) for part in range(TEXTS - 1, 0, -1))
    shorter = [
        tuple(others[index % len(others)][:length])
        for index, length in enumerate(lengths)
        if length < width
    ]
    return [tuple(texts[first]), *shorter]


def compare_padding(
    alone: Sequence[torch.Tensor],
    hooked: Sequence[torch.Tensor],
    baked: Sequence[torch.Tensor],
    unit: float,
) -> PaddingError:
    """Compare logits at real tokens, each text (positions, vocabulary).

    alone, hooked: of the hooked base, each text by itself and padded; baked: padded.
    """
    return PaddingError(
        error=farthest(baked, alone) / unit,
        base_error=farthest(hooked, alone) / unit,
        leak=farthest(baked, hooked) / unit,
    )


def farthest(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Return the largest absolute difference over texts, positions and tokens."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
