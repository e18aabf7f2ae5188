"""What a direction says in tokens: the ones it raises and lowers through the final norm and unembedding.

The logit lens of a direction (after "interpreting GPT: the logit lens", LessWrong AcKRB8wDpdaN6v6ru):
the change of the logits, to first order and up to the norm's scale, is W_U · (γ ⊙ û), γ the final norm's
weight; a LayerNorm takes û's mean out first. Layers after the direction's own are taken as if they passed
it on, which is truer the later the layer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bake.direction import Direction, effective_weight
from bake.errors import DirectionError, UnsupportedError
from bake.model import LoadedModel
from bake.sites import RESIDUAL_SITES, LayerStructure

if TYPE_CHECKING:
    import torch
    from torch import nn

TOKENS = 10


@dataclass(frozen=True)
class TokenScore:
    """A token and how far the unit direction moves its logit, before the final norm's scale."""

    token: str
    score: float


@dataclass(frozen=True)
class LayerTokens:
    """The most raised and the most lowered tokens of one layer's direction, strongest first.

    layer: None where one direction serves all layers.
    """

    layer: int | None
    raised: tuple[TokenScore, ...]
    lowered: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Reading:
    """What a direction says: its tokens where a model was given, its cosines to other directions.

    cosines: {name of the other: {layer: cosine}}, for the layers that both have.
    """

    layers: tuple[LayerTokens, ...]
    cosines: Mapping[str, Mapping[int | None, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "layers": [asdict(entry) for entry in self.layers],
            "cosines": {
                name: {
                    "all" if layer is None else str(layer): value for layer, value in row.items()
                }
                for name, row in self.cosines.items()
            },
        }


def read_tokens(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    direction: Direction,
    *,
    count: int = TOKENS,
) -> tuple[LayerTokens, ...]:
    """Return what every vector of a direction of the residual stream raises and lowers.

    Raises DirectionError for a direction of another width or of a normalised input, UnsupportedError for
    a model without an unembedding.
    """
    import torch

    if count < 1:
        raise DirectionError(f"{count} tokens show nothing; ask for at least 1")
    if direction.site not in RESIDUAL_SITES:
        raise DirectionError(
            f"the direction was found at {direction.site}, a normalised input, which no unembedding reads; "
            f"show one that was found at {' or '.join(RESIDUAL_SITES)}"
        )
    direction.select([], loaded.hidden_size)
    model: Any = loaded.model
    head = model.get_output_embeddings()
    if head is None or loaded.weights is not None:
        raise UnsupportedError("the model has no unembedding in memory to show tokens with")
    norm = final_norm(loaded.model, structure)
    matrix = head.weight.detach()
    names = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    found = []
    for layer in sorted(direction.vectors, key=lambda layer: -1 if layer is None else layer):
        vector = _through(norm, direction.vectors[layer], loaded.hidden_size)
        scores = (matrix.float() @ vector.to(matrix.device)).cpu()[: len(names)]
        size = min(count, len(scores))
        found.append(
            LayerTokens(
                layer,
                *(
                    tuple(
                        TokenScore(names[int(index)], float(scores[int(index)]))
                        for index in torch.topk(scores, size, largest=largest).indices
                    )
                    for largest in (True, False)
                ),
            )
        )
    return tuple(found)


def final_norm(model: nn.Module, structure: LayerStructure) -> nn.Module | None:
    """Return the norm behind the last decoder layer: the last one that stands beside the layers."""
    parent, _, name = structure.layers.rpartition(".")
    beside = model.get_submodule(parent).named_children()
    norms = [
        module
        for other, module in beside
        if other != name
        and ("norm" in type(module).__name__.lower() or "norm" in other or other == "ln_f")
        and next(module.parameters(), None) is not None
        and "emb" not in other
    ]
    return norms[-1] if norms else None


def _through(norm: nn.Module | None, vector: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Return γ ⊙ û, with û's mean taken out where the norm takes it out, (hidden_size,) float32."""
    import torch

    if norm is None:
        return vector.float()
    if isinstance(norm, torch.nn.LayerNorm):
        vector = vector - vector.mean()
    return vector.float() * effective_weight(norm, hidden_size)


def compare_directions(
    direction: Direction, others: Mapping[str, Direction]
) -> dict[str, dict[int | None, float]]:
    """Return the cosines of a direction to others, layer by layer.

    A direction for all layers is compared with every layer of the other. Raises DirectionError for
    another width or where the two have no layer in common.
    """
    found: dict[str, dict[int | None, float]] = {}
    for name, other in others.items():
        if other.hidden_size != direction.hidden_size:
            raise DirectionError(
                f"{name} is {other.hidden_size} wide and the direction {direction.hidden_size}; "
                "compare directions of one model"
            )
        layers = _common_layers(direction, other)
        if not layers:
            raise DirectionError(f"{name} has no layer in common with the direction")
        found[name] = {layer: _cosine(direction, other, layer) for layer in layers}
    return found


def _common_layers(first: Direction, second: Direction) -> Sequence[int | None]:
    if None in first.vectors and None in second.vectors:
        return [None]
    own = [set(d.vectors) - {None} for d in (first, second) if None not in d.vectors]
    return sorted(layer for layer in set.intersection(*own) if layer is not None)


def _cosine(first: Direction, second: Direction, layer: int | None) -> float:
    a, b = (
        direction.vectors[None] if None in direction.vectors else direction.vectors[layer]
        for direction in (first, second)
    )
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
