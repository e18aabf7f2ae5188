"""The route `insert`: one extra stock decoder layer after each pushed one, proven on the twin.

Exact where the architecture has no slot at all, at the price of compute; only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bake.anatomy.flags import FlagEffect
from bake.anatomy.insertion.filling import Filling, propose_fillings
from bake.anatomy.insertion.growth import plan_growth
from bake.anatomy.insertion.rewriter import Insertion
from bake.anatomy.twin import Twin, TwinVerdict
from bake.checkpoint.loading import build_on_meta
from bake.errors import BakeError, UnsupportedError
from bake.sites import LayerStructure

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

# How much louder the embeddings of the twin are for a filling that is exact up to the norm's epsilon over
# the mean square of the stream: a small random model has a far smaller stream than a trained one.
_LOUDER = 32.0


def find_insertion(
    config: PreTrainedConfig,
    twin: Twin,
    make_twin: Callable[[], Twin],
    structure: LayerStructure,
    effects: Sequence[FlagEffect],
) -> tuple[Insertion, TwinVerdict]:
    """Find what an inserted layer can hold, and prove it on the twin.

    structure: the twin's. make_twin: makes another like `twin`. effects: its config's bias flags.
    Raises UnsupportedError with a reason for everything that was tried, and whatever transformers
    raises for a twin that does not fit.
    """
    reasons: list[str] = []
    loud: Twin | None = None
    for filling in propose_fillings(twin, structure, effects):
        prover = twin
        if filling.source == "squares":
            prover = loud = loud or _make_louder(make_twin())
        try:
            insertion = _make(prover.config, structure, filling)
            layers = range(insertion.layer_count)
            verdict = prover.prove_rewriting(structure, "mlp_out", insertion, layers)
            if verdict.passed:
                return _make(config, structure, filling), verdict
        except BakeError as error:
            reasons.append(str(error))
            continue
        reasons.append(f"{filling.describe()}: {verdict.reason}")
    raise UnsupportedError(
        f"no layer can be inserted that only adds the push: {'; '.join(dict.fromkeys(reasons))}"
    )


def _make(config: PreTrainedConfig, structure: LayerStructure, filling: Filling) -> Insertion:
    """Return the insertion for a model, the real one or its twin; raise where it cannot grow."""
    before = build_on_meta(config)
    count = len(_layers(before, structure))
    text = config.to_json_string(use_diff=False)
    growth = plan_growth(config, text, structure.layers, filling, range(count))
    largest = max(
        sum(parameter.numel() for parameter in layer.parameters())
        for layer, place in zip(_layers(growth.model, structure), growth.places, strict=True)
        if place.inserted
    )
    outside = _outside(growth.model, structure) - _outside(before, structure)
    largest += outside // (len(growth.places) - count)
    width = int(config.get_text_config(decoder=True).hidden_size)
    return Insertion(structure.layers, filling, count, width, largest)


def _outside(model: nn.Module, structure: LayerStructure) -> int:
    """Return how many parameters a model has beside its decoder layers."""
    layers = int(sum(parameter.numel() for parameter in _layers(model, structure).parameters()))
    return sum(parameter.numel() for parameter in model.parameters()) - layers


def _layers(model: nn.Module, structure: LayerStructure) -> Any:
    return model.get_submodule(structure.layers)


def _make_louder(twin: Twin) -> Twin:
    """Give a twin a residual stream as large as a trained model's."""
    import torch

    embeddings: Any = twin.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        embeddings.weight.mul_(_LOUDER)
    twin.logits = twin.run(twin.model)
    return twin


__all__ = ["Insertion", "find_insertion"]
