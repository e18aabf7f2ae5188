"""A push on top of biases that were trained: a step along one direction where its band begins, and back.

Trained biases of neighbouring layers can be nearly parallel, so that being alike says nothing. But they
drift from layer to layer, and a push of a band makes the same jump twice, once with each sign. The score is
minus the cosine of the two changes that fit best; what trained models reach is in `NATURAL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.support.text import list_numbers

if TYPE_CHECKING:
    import torch

# The highest score of models without a push, and how many were scored (benchmarks/detection_alone.py):
# of bands of two layers and more, and of single layers, which step up and down by themselves.
NATURAL, NATURAL_SINGLE, SCORED = 0.45, 0.89, 36
LEAST, LEAST_SINGLE = 0.7, 0.95
FEWEST_LAYERS = 4


@dataclass(frozen=True)
class Step:
    """Where layers' vectors step along one direction and back. score: −cos of the two steps, at most 1."""

    score: float
    first: int
    stop: int

    @property
    def margin(self) -> float:
        """How far the score is above what is called a push."""
        return self.score - (LEAST_SINGLE if self.stop - self.first == 1 else LEAST)

    @property
    def is_found(self) -> bool:
        """Whether the score is above what is natural."""
        return self.margin >= 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        natural = NATURAL_SINGLE if self.stop - self.first == 1 else NATURAL
        return {"score": self.score, "highest_without": natural, "scored": SCORED}

    def describe(self, site: str) -> str:
        """Return it in a sentence."""
        values = self.to_dict()
        return (
            f"most likely a push at {site} in layers {list_numbers(range(self.first, self.stop))}: there "
            f"the trained biases step along one direction and back (score {self.score:.2f}; the highest of "
            f"{SCORED} without a push was {values['highest_without']:.2f})"
        )


def find_step(vectors: Mapping[int, torch.Tensor]) -> Step | None:
    """Return the step with the highest score; None where there are too few layers.

    vectors: {layer: (hidden_size,) float64}. A push that reaches the last layer, or begins at the
    first, has one step only and is not seen.
    """
    import torch

    layers = sorted(vectors)
    if len(layers) < FEWEST_LAYERS or layers != list(range(layers[0], layers[-1] + 1)):
        return None
    held = torch.stack([vectors[layer] for layer in layers])
    changes = torch.nn.functional.normalize(held[1:] - held[:-1], dim=1)
    if not bool(changes.isfinite().all()):
        return None
    scores = -(changes @ changes.T)
    steps = [
        Step(float(scores[up, down]), layers[up + 1], layers[down + 1])
        for up in range(len(changes))
        for down in range(up + 1, len(changes))
    ]
    return max(steps, key=lambda step: step.margin)


def read_step(vectors: Mapping[int, torch.Tensor], step: Step) -> dict[int, torch.Tensor]:
    """Return what a step adds in its layers: their part along it, beyond the neighbours' outside."""
    import torch

    up = vectors[step.first] - vectors[step.first - 1]
    down = vectors[step.stop] - vectors[step.stop - 1]
    unit = torch.nn.functional.normalize(up - down, dim=0)
    outside = float((vectors[step.first - 1] + vectors[step.stop]) @ unit) / 2
    return {
        layer: (float(vectors[layer] @ unit) - outside) * unit
        for layer in range(step.first, step.stop)
    }


def list_scores(found: Sequence[tuple[str, Step]]) -> str:
    """Return the scores of sites as a phrase."""
    return ", ".join(f"{site} {step.score:.2f}" for site, step in found)
