"""The measured law: the coefficients that shift pairs most for what they cost, from derivatives.

To first order a push of α_l in each layer shifts pairs by g·α; to second order it costs neutral text
KL(base ‖ steered) = ½ αᵀGα, G the Fisher information of the next token along the layers' directions
(Amari & Nagaoka, Methods of Information Geometry, 2000, § 2). Of all α ≥ 0 of one cost the one with the
largest shift solves min ½ αᵀGα − g·α, a non-negative least-squares problem (Lawson & Hanson 1974). Both are
measured by finite differences: a small push in one layer at a time, all layers of a text in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bake.errors import BakeError
from bake.support.processes import divide, put_together
from bake.sweeps.arms import Arm, compare_arms
from bake.sweeps.design import BASE
from bake.sweeps.measurements import Texts, encode_neutral, measure_pairs
from bake.sweeps.summary import pair_gaps

if TYPE_CHECKING:
    import numpy as np

    from bake.models.forward import LanguageModel
    from bake.strength.coefficients import Push

MEASURED_LAW = "measured"
STEP = 0.1  # of each layer's α by the default law
RIDGE = 0.1  # of G's diagonal: what few texts cannot tell apart is shared out
KEPT_TOKENS = 2048  # the likeliest of each place; the others count as one
NEUTRAL_TOKENS = 64


@dataclass(frozen=True)
class Derivatives:
    """What a small push in each layer does, in units of the α that it was measured from.

    layers: L of them. shift: (L,), nats a token of pairs, per unit. fisher: (L, L), nats of KL on neutral
    text per unit²; KL ≈ ½ xᵀ · fisher · x.
    """

    layers: tuple[int, ...]
    shift: np.ndarray
    fisher: np.ndarray

    def solve(self) -> dict[int, float]:
        """Return {layer: units ≥ 0} with the largest shift for their cost, which is that of one unit each.

        Raises BakeError where no layer shifts the pairs.
        """
        import numpy as np
        from scipy.optimize import nnls

        costs = np.diag(self.fisher)
        if not (
            np.isfinite(self.fisher).all() and np.isfinite(self.shift).all() and costs.max() > 0
        ):
            raise BakeError(
                "--law measured: a small push gives no finite effect to measure; try --law inverse-sqrt-d"
            )
        # A layer that costs nothing, as far as is seen, gets no weight for nothing.
        ridged = self.fisher + RIDGE * np.diag(np.maximum(costs, RIDGE * costs.max()))
        lower = np.linalg.cholesky(ridged)
        found, _ = nnls(lower.T, np.linalg.solve(lower, self.shift))
        if not found.any():
            raise BakeError(
                "--law measured: in no layer does a small push shift the held-out pairs that way; try "
                "another direction or site, or another --law"
            )
        ones = np.ones(len(found))
        found *= np.sqrt((ones @ self.fisher @ ones) / (found @ self.fisher @ found))
        return {layer: float(x) for layer, x in zip(self.layers, found, strict=True)}


def follow_measured_law(loaded: LanguageModel, site: str, push: Push, texts: Texts) -> Push:
    """Return a push with α_l ≥ 0 measured on pairs and neutral texts in place of those of its law.

    push: at m = 1; to second order, the one returned costs what it does. Raises BakeError where no layer
    shifts the pairs.
    """
    units = measure_derivatives(loaded, site, push, texts).solve()
    given = {entry.layer: units[entry.layer] * entry.coefficient for entry in push.layers}
    return replace(push, law=MEASURED_LAW, given=given).at(push.multiplier)


def measure_derivatives(loaded: LanguageModel, site: str, push: Push, texts: Texts) -> Derivatives:
    """Push every layer by itself, a step of the push; return what that does to pairs and neutral texts."""
    import numpy as np

    layers = tuple(entry.layer for entry in push.layers)
    arms = [Arm(BASE, "base")]
    for layer in layers:
        vectors = {layer: push.vectors[layer] * STEP}
        arms.append(Arm(f"layer {layer}", "direction", push.multiplier, site, push=vectors))
    scored = measure_pairs(loaded, arms, texts.pairs, chat_template=texts.chat_template)
    base = pair_gaps(scored[BASE])
    shift = [(pair_gaps(scored[arm.name]) - base).mean() / STEP for arm in arms[1:]]
    neutral = encode_neutral(loaded.tokenizer, texts.neutral, NEUTRAL_TOKENS, texts.chat_template)
    parts = put_together([_fisher(loaded, arms, *text) for text in divide(neutral)])
    places = sum(len(ids) - start + 1 for ids, start in neutral)
    return Derivatives(layers, np.array(shift), np.sum(parts, axis=0) / places)


def _fisher(
    loaded: LanguageModel, arms: Sequence[Arm], ids: Sequence[int], start: int
) -> np.ndarray:
    """Return Σ over a text's places of E[∂log p ∂log pᵀ], (layers, layers)."""
    import numpy as np
    import torch

    rows = []
    base = chosen = weights = None
    for _, logs in compare_arms(loaded, arms, ids, start=start):
        if chosen is None:
            chosen = logs.topk(min(KEPT_TOKENS, logs.shape[-1] - 1)).indices
        likely = logs.gather(-1, chosen)
        others = torch.log1p(-likely.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
        lumped = torch.cat([likely, others], dim=-1)
        if base is None or weights is None:
            base, weights = lumped, lumped.exp()
            continue
        change = (lumped - base) / STEP
        change -= (weights * change).sum(-1, keepdim=True)
        rows.append((change * weights.sqrt()).flatten())
    stacked = torch.stack(rows)
    found: np.ndarray = (stacked @ stacked.T).cpu().numpy().astype(np.float64)
    return found
