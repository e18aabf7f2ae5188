"""What a direction says in tokens: the ones it raises and lowers through the final norm and unembedding.

The logit lens of a direction (after "interpreting GPT: the logit lens", LessWrong AcKRB8wDpdaN6v6ru):
the change of the logits, to first order and up to the norm's scale, is W_U · (γ ⊙ û), γ the final norm's
weight; a LayerNorm takes û's mean out first. Layers after the direction's own are taken as if they passed
it on, which is truer the later the layer is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bake.directions.direction import Direction, effective_weight, removes_mean
from bake.errors import DirectionError, UnsupportedError
from bake.models.forward import LanguageModel
from bake.sites import RESIDUAL_SITES, is_usable_at

if TYPE_CHECKING:
    import torch
    from torch import nn

TOKENS = 10
TRIED = 8  # tokens that are run to see what the unembedding reads
SAME = 0.9999  # cosine from which two activations are one


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

    @property
    def words(self) -> float:
        """The share of these tokens that read as words: letters, three or more."""
        tokens = [each.token.strip() for each in (*self.raised, *self.lowered)]
        return sum(len(t) > 2 and t.isalpha() for t in tokens) / len(tokens) if tokens else 0.0


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
    loaded: LanguageModel,
    direction: Direction,
    *,
    count: int = TOKENS,
) -> tuple[LayerTokens, ...]:
    """Return what every vector of a direction of the residual stream raises and lowers.

    Raises DirectionError for a direction of another width or of a normalised input, UnsupportedError for
    a model without an unembedding or with one that does not read a norm of the stream.
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
    norm = find_final_norm(loaded)
    matrix = head.weight.detach()
    names = [loaded.tokenizer.decode([index]) for index in range(len(loaded.tokenizer))]
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


def find_final_norm(loaded: LanguageModel) -> nn.Module | None:
    """Return the module that stands between the last decoder layer and the unembedding; None for nothing.

    Found by what flows: names and places differ too much (LFM 2's is called embedding_norm, and Gemma 4
    has others beside it). Raises UnsupportedError where the unembedding reads something else than a norm
    of the last layer's output, such as a projection of it or another transformation's.
    """
    import torch

    model: Any = loaded.model
    last = len(list(model.get_submodule(loaded.structure.layers).children())) - 1
    head = model.get_output_embeddings()
    inside = f"{loaded.structure.layers}."
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    stream: list[torch.Tensor] = []
    read: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        if arguments and all(isinstance(x, torch.Tensor) for x in (arguments[0], output)):
            seen[module] = arguments[0], output

    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            leaf = next(module.children(), None) is None  # BERT's head has a whole transformation.
            if leaf and not name.startswith(inside) and module is not head:
                hooks.callback(module.register_forward_hook(keep).remove)
        hooks.callback(
            head.register_forward_pre_hook(lambda _, given: read.append(given[0])).remove
        )
        hooks.enter_context(
            loaded.captured("mlp_out", [last], lambda _, output: stream.append(output))
        )
        ids = torch.arange(1, 1 + TRIED, device=head.weight.device)[None]
        model(input_ids=ids, use_cache=False)
    if read and stream:
        for module, (given, output) in seen.items():
            if _same(stream[0], given) and _same(output, read[0]):
                return module
        if _same(stream[0], read[0]):
            return None
    raise UnsupportedError(
        "between its last layer and its unembedding this architecture does more than one norm, so that "
        "what a direction does to the logits cannot be read off these two"
    )


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Tell whether the last position of two activations is the same but for a factor."""
    import torch

    if first.shape[-1] != second.shape[-1]:
        return False
    a, b = (values.reshape(-1, values.shape[-1])[-1].float().cpu() for values in (first, second))
    return float(torch.cosine_similarity(a, b, dim=0)) > SAME


def _through(norm: nn.Module | None, vector: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Return γ ⊙ û, with û's mean taken out where the norm takes it out, (hidden_size,) float32."""
    if norm is None:
        return vector.float()
    if removes_mean(norm, hidden_size):
        vector = vector - vector.mean()
    return vector.float() * effective_weight(norm, hidden_size)


def compare_directions(
    direction: Direction, others: Mapping[str, Direction]
) -> dict[str, dict[int | None, float]]:
    """Return the cosines of a direction to others, layer by layer.

    A direction for all layers is compared with every layer of the other. Raises DirectionError for
    another width or space, or where the two have no layer in common.
    """
    found: dict[str, dict[int | None, float]] = {}
    for name, other in others.items():
        if other.hidden_size != direction.hidden_size:
            raise DirectionError(
                f"{name} is {other.hidden_size} wide and the direction {direction.hidden_size}; "
                "compare directions of one model"
            )
        if not is_usable_at(other.site, direction.site):
            raise DirectionError(
                f"{name} was found at {other.site} and the direction at {direction.site}, which are "
                "different spaces; compare directions of one"
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
