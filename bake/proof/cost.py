"""What a push costs on neutral text: how far the next-token distributions move, and how much it adds up to.

The figures are of logits that the proof has anyway: the base in float32, alone and hooked, on the
equivalence prompts, which no part of a bake is found from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.sites import RESIDUAL_SITES

if TYPE_CHECKING:
    import torch

    from bake.strength.coefficients import Push

# Bounds on the 95th percentile of KL(base ‖ steered) on neutral text, in nats: above the first, sampled
# text comes apart; below the second, nobody sees a difference.
MOST_KL, LEAST_KL = 1.0, 0.01


@dataclass(frozen=True)
class Cost:
    """What a push or an ablation does to neutral text.

    kl_mean, kl_p95: KL(base ‖ steered) over all positions, in nats. top1_agreement: share of positions
    whose most likely token stays. accumulated: ‖Σ α_l û_l‖ over the band, in units of μ of its last layer;
    None at a normalised input, where pushes do not add up in the residual stream. tokens: positions in all.
    """

    kl_mean: float
    kl_p95: float
    top1_agreement: float
    accumulated: float | None
    tokens: int

    def warn(self, multiplier: float) -> str | None:
        """Return a sentence on a push that costs too much or moves nothing; None for any other."""
        if not self.kl_p95 <= MOST_KL:
            # KL grows with the square of a small push.
            share = math.sqrt(MOST_KL / self.kl_p95) if math.isfinite(self.kl_p95) else 0.01
            return (
                f"m = {multiplier:g} moves neutral text by {self.kl_p95:.3g} nats (95th percentile of KL; "
                f"above {MOST_KL:g} text comes apart): try -m auto, or |m| ≤ "
                f"{_one_digit(abs(multiplier) * share):g}"
            )
        if self.kl_p95 < LEAST_KL:
            return (
                f"m = {multiplier:g} hardly moves neutral text ({self.kl_p95:.2g} nats, 95th percentile of "
                "KL): try -m auto, or a larger m"
            )
        return None


def measure_cost(
    base: Sequence[torch.Tensor],
    hooked: Sequence[torch.Tensor],
    push: Push | None = None,
    site: str = "",
) -> Cost:
    """Compare logits of neutral texts, each (positions, vocabulary), of the base and the hooked model.

    push, site: of a push, which adds up in the residual stream; an ablation has none.
    """
    import torch

    divergences, agreeing = [], 0
    for plain, steered in zip(base, hooked, strict=True):
        left, right = plain.log_softmax(-1), steered.log_softmax(-1)
        divergences.append((left.exp() * (left - right)).sum(-1).clamp(min=0).double())
        agreeing += int((plain.argmax(-1) == steered.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return Cost(
        float(kl.mean()),
        float(torch.quantile(kl, 0.95)),
        agreeing / len(kl),
        _accumulate(push) if push is not None and site in RESIDUAL_SITES else None,
        len(kl),
    )


def _accumulate(push: Push) -> float:
    """Return the length of the summed push over the band, in units of its last layer's norm."""
    import torch

    total = torch.stack([vector.double() for vector in push.vectors.values()]).sum(0)
    return float(total.norm()) / push.layers[-1].activation_norm


def _one_digit(value: float) -> float:
    """Round a positive number down to its first digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.floor(value / unit + 1e-9) * unit:g}")
