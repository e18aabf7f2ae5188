"""Sampled text and what is counted in it: continuations, target words, perplexity, intervals.

Sampling noise is keyed by prompt, sample and step and shared by every model that is compared, so
comparisons are paired and do not depend on how rows are batched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bake.errors import BakeError, PromptError
from bake.models.forward import LoadedModel, decode, last_logits

if TYPE_CHECKING:
    import numpy as np
    import torch

Tokens = tuple[int, ...]
ROWS = 64  # sequences per forward that continues them
SCORED = 8  # per forward that scores them, whose logits take more memory
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def check_seed(seed: int) -> None:
    """Raise BakeError for a seed that not every generator of random numbers takes."""
    if not 0 <= seed < 2**63:
        raise BakeError(f"the seed {seed} is out of range; give one from 0 to {2**63 - 1}")


def sample_continuations(
    loaded: LoadedModel,
    prompts: Sequence[Tokens],
    *,
    new_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[Tokens]:
    """Return `samples` continuations of each prompt, prompt by prompt, cut at the stop token.

    Draws argmax(logits / temperature + Gumbel noise), which samples exactly from the softmax.
    """
    if temperature <= 0 or new_tokens < 1 or not all(prompts):
        raise PromptError(
            "sampling needs a temperature above 0, new tokens, and prompts with tokens"
        )
    rows = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    # Rows of one length need no padding, which keeps every architecture's positions right.
    rows.sort(key=lambda row: len(prompts[row[0]]))
    found: dict[tuple[int, int], Tokens] = {}
    start = 0
    while start < len(rows):
        length = len(prompts[rows[start][0]])
        stop = start
        while stop < len(rows) and stop - start < ROWS and len(prompts[rows[stop][0]]) == length:
            stop += 1
        group = rows[start:stop]
        drawn = _sample_group(loaded, prompts, group, new_tokens, temperature, seed)
        found.update(zip(group, drawn, strict=True))
        start = stop
    ordered = [found[key] for key in sorted(found)]
    return [_cut(tokens, stop_token) for tokens in ordered]


def _sample_group(
    loaded: LoadedModel,
    prompts: Sequence[Tokens],
    group: Sequence[tuple[int, int]],
    new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Tokens]:
    import torch

    def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
        noise = [draw_noise(seed, index, sample, step, logits.shape[-1]) for index, sample in group]
        return (logits / temperature + torch.stack(noise)).argmax(dim=-1)

    tokens = torch.tensor([prompts[index] for index, _ in group])
    return [tuple(row) for row in decode(loaded, tokens, new_tokens, choose).tolist()]


def draw_noise(seed: int, prompt: int, sample: int, step: int, size: int) -> torch.Tensor:
    import numpy as np
    import torch

    bits = np.random.Philox(key=[seed, prompt], counter=[0, 0, sample, step])
    uniform = np.random.Generator(bits).random(size)
    return torch.from_numpy(-np.log(-np.log(uniform + 1e-12) + 1e-12)).float()


def _cut(tokens: Tokens, stop_token: int | None) -> Tokens:
    return tokens[: tokens.index(stop_token)] if stop_token in tokens else tokens


def score_continuations(
    loaded: LoadedModel, prompts: Sequence[Tokens], continuations: Sequence[Tokens]
) -> list[float]:
    """Return each continuation's total negative log-likelihood in nats under the model.

    Texts of the same lengths go through together.
    """
    import torch
    from torch.nn.functional import cross_entropy

    losses = [0.0] * len(prompts)
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        if continuation:
            shapes.setdefault((len(prompt), len(continuation)), []).append(index)
    with torch.no_grad():
        for (_, length), indices in shapes.items():
            for start in range(0, len(indices), SCORED):
                rows = indices[start : start + SCORED]
                ids = torch.tensor([prompts[row] + continuations[row] for row in rows])
                logits, _ = last_logits(loaded, ids, length + 1, use_cache=False)
                for row, given, tokens in zip(rows, logits, ids, strict=True):
                    targets = tokens[-length:].to(given.device)
                    losses[row] = float(cross_entropy(given[:-1].float(), targets, reduction="sum"))
    return losses


def count_words(text: str, targets: frozenset[str]) -> tuple[int, int]:
    """Return (target words, all words) of a text."""
    words = [word.lower() for word in WORD.findall(text)]
    return sum(word in targets for word in words), len(words)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of statistic(indices) over resampled indices of `count` items."""
    return middle_of([statistic(rows) for rows in resample(count, draws, seed)], level)


def resample(count: int, draws: int, seed: int = 0) -> list[np.ndarray]:
    """Return `draws` times the indices of `count` items drawn with replacement."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return [generator.integers(0, count, count) for _ in range(draws)]


def middle_of(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the two quantiles between which a share of the finite values lies; nan where none is."""
    import numpy as np

    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    tail = (1 - level) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)
