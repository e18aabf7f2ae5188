"""The mean of what goes through heads and neurons, over the content tokens of the calibration prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bake.errors import BakeError, PromptError, UnsupportedError
from bake.hooks import parts_read
from bake.models.forward import LanguageModel, run_layers
from bake.support.processes import gather
from bake.support.progress import track
from bake.texts.prompts import TokenBatch
from bake.writes import Part, Silence

if TYPE_CHECKING:
    import torch


def measure_means(
    loaded: LanguageModel, silence: Silence, batches: Sequence[TokenBatch]
) -> dict[str, torch.Tensor]:
    """Return {part's name: (columns,) float64}.

    Padding, special and first tokens do not count, as for the norms. Where several processes work together,
    each brings its own batches. Raises PromptError where no token is left, UnsupportedError where what
    the projection reads is not laid out by texts and positions.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    current: list[TokenBatch] = []

    def receive(part: Part, activation: torch.Tensor) -> None:
        mask = current[-1].content_mask
        if activation.shape[:2] != mask.shape:
            raise UnsupportedError(
                f"{part.write.parameter} reads {tuple(activation.shape)}, which is not one row a token: "
                "its mean cannot be measured; leave --mean out"
            )
        chosen = activation[mask.to(activation.device)].double().sum(dim=0).cpu()
        sums[part.name] = sums.get(part.name, 0) + chosen

    last = loaded.layer(max(silence.layers), "")
    with parts_read(loaded.model, silence, receive):
        run_layers(loaded, track(batches, "calibrating"), last, current.append)
    shares = gather((sum(int(batch.content_mask.sum()) for batch in batches), sums))
    count = sum(tokens for tokens, _ in shares)
    if not count:
        raise PromptError("the prompts hold no content tokens; give longer ones with --prompts")
    found = {
        part.name: torch.stack([share[part.name] for _, share in shares if share]).sum(dim=0)
        / count
        for part in silence.parts
    }
    if not all(mean.isfinite().all() for mean in found.values()):
        raise BakeError("the base gives activations that are not finite, so they have no mean")
    return found
