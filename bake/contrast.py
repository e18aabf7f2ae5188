"""Find a direction from contrast pairs: difference of means of the activations at a site.

Source of the method: Contrastive Activation Addition (arXiv 2312.06681). Positions come from the
tokenizer's offsets, so a shared prompt, special tokens and padding never shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.direction import Direction, normalise
from bake.errors import DirectionError, PromptError
from bake.model import LoadedModel, run_layers
from bake.progress import track
from bake.prompts import Encoded, TokenBatch, encode, make_batches, read_jsonl
from bake.resources import find_set, shipped_sets
from bake.sites import LayerStructure
from bake.steering import captured, submodule

if TYPE_CHECKING:
    import torch

METHODS = ("mean",)
TOKENS = ("last", "mean", "all")


@dataclass(frozen=True)
class ContrastPair:
    """Two texts that differ in what the direction should mean; `prompt` is the part they share."""

    prompt: str
    positive: str
    negative: str


def read_pairs(name: str | Path) -> list[ContrastPair]:
    """Read contrast pairs: JSONL with "positive" and "negative", and "prompt" where they share one.

    Raises PromptError for a missing file or a malformed line, DirectionError for identical texts or an
    empty completion.
    """
    path = find_set(str(name), "pairs")
    if path is None:
        known = ", ".join(shipped_sets("pairs"))
        raise PromptError(f"no pairs file or set {str(name)!r}; give a file or one of: {known}")
    pairs = [_pair(row, f"{path.name}:{number}") for number, row in read_jsonl(path)]
    if not pairs:
        raise PromptError(
            f'{path} holds no pairs; write one a line as {{"positive": …, "negative": …}}'
        )
    return pairs


def _pair(row: dict[str, Any], place: str) -> ContrastPair:
    prompt, positive, negative = (row.get(k, "") for k in ("prompt", "positive", "negative"))
    if not all(isinstance(text, str) for text in (prompt, positive, negative)):
        raise PromptError(f"{place}: prompt, positive and negative must be strings")
    if not positive.strip() or not negative.strip():
        raise DirectionError(f"{place}: an empty completion has no token to read; write both texts")
    if positive == negative:
        raise DirectionError(
            f"{place}: the two texts are identical, so their difference is nothing"
        )
    return ContrastPair(prompt, positive, negative)


def find_direction(
    loaded: LoadedModel,
    structure: LayerStructure,
    site: str,
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    layers: Sequence[int],
    *,
    method: str = "mean",
    token: str = "last",
    model_name: str = "",
) -> Direction:
    """Return one unit direction per layer: mean over pairs of positive − negative activation.

    token: "last" reads the last content token, "mean" averages over the completion's tokens, "all"
    over every content token. Raises DirectionError where a difference is zero or not finite.
    """
    if method not in METHODS:
        raise DirectionError(f"unknown method {method!r}; one of {', '.join(METHODS)}")
    if token not in TOKENS:
        raise DirectionError(f"unknown token position {token!r}; one of {', '.join(TOKENS)}")
    texts = [pair.prompt + text for pair in pairs for text in (pair.positive, pair.negative)]
    starts = [len(pair.prompt) for pair in pairs for _ in range(2)]
    encoded = encode(tokenizer, texts)
    weights = [
        _position_weights(text, start, token) for text, start in zip(encoded, starts, strict=True)
    ]
    means = read_activations(loaded, structure, site, encoded, weights, layers)
    vectors: dict[int | None, torch.Tensor] = {}
    for layer in layers:
        difference = (means[layer][0::2] - means[layer][1::2]).mean(dim=0)
        vectors[layer] = normalise(difference, f"the difference of means at layer {layer}")
    metadata = {"method": method, "token": token, "pairs": str(len(pairs)), "model": model_name}
    return Direction(vectors, site, metadata)


def read_activations(
    loaded: LoadedModel,
    structure: LayerStructure,
    site: str,
    encoded: Sequence[Encoded],
    weights: Sequence[Sequence[float]],
    layers: Sequence[int],
) -> dict[int, torch.Tensor]:
    """Return {layer: (texts, hidden_size) float64}: each text's activations summed with its weights."""
    import torch

    found = {
        layer: torch.zeros(len(encoded), loaded.hidden_size, dtype=torch.float64)
        for layer in layers
    }
    current: list[TokenBatch] = []

    def receive(layer: int, activation: torch.Tensor) -> None:
        batch = current[-1]
        for row, index in enumerate(batch.indices):
            kept = batch.attention_mask[row].bool()
            values = activation[row][kept.to(activation.device)].double().cpu()
            found[layer][index] = torch.tensor(weights[index], dtype=torch.float64) @ values

    last = submodule(loaded.model, structure, max(layers), "")
    batches = list(track(make_batches(encoded), "reading pairs"))
    with captured(loaded.model, structure, site, list(layers), receive):
        run_layers(loaded, batches, last, current.append)
    return found


def _position_weights(text: Encoded, completion_start: int, token: str) -> list[float]:
    """Return each position's weight in the text's mean; they sum to 1."""
    content = [position for position, is_content in enumerate(text.content) if is_content]
    if not content:
        raise DirectionError("a text of the pairs has no content token; write longer texts")
    if token == "last":
        chosen = content[-1:]
    elif token == "all":
        chosen = content
    else:
        # A token belongs to the completion when it ends inside it.
        chosen = [p for p in content if text.offsets[p][1] > completion_start] or content[-1:]
    weights = [0.0] * len(text.ids)
    for position in chosen:
        weights[position] = 1.0 / len(chosen)
    return weights
