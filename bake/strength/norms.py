"""Measure: the mean L2 norm of the activation at a site, layer by layer, on calibration prompts.

Every content token's norm is kept (8 bytes each), so medians are exact and several processes can put
their tokens together. Massive activations (arXiv 2402.17762), which would inflate the mean 1.3 to 13 times,
are dropped: tokens above 10 × their layer's median, and those far outside the spread of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError, PromptError
from bake.hooks import check_activation
from bake.models.forward import LanguageModel, run_layers
from bake.support.html import show
from bake.support.processes import gather
from bake.support.progress import track, warn
from bake.support.text import explain
from bake.texts.prompts import TokenBatch

if TYPE_CHECKING:
    import numpy as np
    import torch

# A token is massive above 10 × the median of its layer, or where it is 10 robust standard deviations
# (1.4826 · the median absolute deviation) above it; never below 2 × the median, which norms at normalised
# inputs pass without being massive.
OUTLIER_FACTOR, OUTLIER_DEVIATIONS, LEAST_OUTLIER = 10.0, 10.0, 2.0
SKEWED = 0.15  # mean and median apart by this share
STATISTICS = ("mean", "median")


@dataclass(frozen=True)
class LayerNorms:
    """One layer's content-token norms, outliers dropped. `spread` is their standard deviation."""

    layer: int
    mean: float
    median: float
    spread: float
    tokens: int
    dropped: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for files and `--json`."""
        return {
            "layer": self.layer,
            "mean": self.mean,
            "median": self.median,
            "spread": self.spread,
            "tokens": self.tokens,
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class ActivationNorms:
    """μ_l of the unsteered base at one site, for the measured layers.

    texts: what `bake.texts.prompts.identify_prompts` says of the prompts; None where it is not known.
    """

    site: str
    statistic: str
    hidden_size: int
    prompts: int
    layers: tuple[LayerNorms, ...]
    texts: Mapping[str, str | None] | None = None

    def __repr__(self) -> str:
        return f"<ActivationNorms: {self.summary}>"

    def _repr_html_(self) -> str:
        rows = [
            (str(each.layer), f"{each.mean:.4g}", f"{each.median:.4g}", str(each.dropped))
            for each in self.layers
        ]
        header = ("layer", "mean", "median", "tokens dropped")
        return show(f"Activation norms: {self.summary}", header, rows, [self.warning or ""])

    @property
    def summary(self) -> str:
        """The norms in a few words: site, layers, and from where to where they go."""
        values = list(self.values().values())
        return (
            f"{self.site}, {len(values)} layers, {self.statistic} {min(values):.4g} to "
            f"{max(values):.4g}, over {self.prompts} prompts"
        )

    def values(self) -> dict[int, float]:
        """Return {layer: μ_l} by the chosen statistic."""
        return {entry.layer: getattr(entry, self.statistic) for entry in self.layers}

    @property
    def dropped_share(self) -> float:
        """Share of content tokens dropped as massive activations, over all layers."""
        seen = sum(entry.tokens + entry.dropped for entry in self.layers)
        return sum(entry.dropped for entry in self.layers) / seen

    @property
    def warning(self) -> str | None:
        """A sentence on layers whose mean and median are far apart; None where there are none."""
        skewed = [entry for entry in self.layers if abs(entry.mean / entry.median - 1) >= SKEWED]
        if not skewed:
            return None
        worst = max(skewed, key=lambda entry: abs(entry.mean / entry.median - 1))
        layers = ", ".join(str(entry.layer) for entry in skewed)
        where = f"layers {layers}" if len(skewed) > 1 else f"layer {layers}"
        other = next(name for name in STATISTICS if name != self.statistic)
        return (
            f"mean and median of the activation norms are {SKEWED:.0%} or more apart in {where} "
            f"(layer {worst.layer}: {worst.mean:.4g} and {worst.median:.4g}); μ is the {self.statistic}, "
            f"compare with --statistic {other}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for files and `--json`."""
        return {
            "site": self.site,
            "statistic": self.statistic,
            "hidden_size": self.hidden_size,
            "prompts": self.prompts,
            **({"texts": dict(self.texts)} if self.texts else {}),
            "dropped_share": self.dropped_share,
            "layers": [entry.to_dict() for entry in self.layers],
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ActivationNorms:
        """Read what `to_dict` wrote; raise BakeError where it is something else."""
        try:
            found = ActivationNorms(
                site=str(values["site"]),
                statistic=str(values["statistic"]),
                hidden_size=int(values["hidden_size"]),
                prompts=int(values["prompts"]),
                layers=tuple(_read_layer(entry) for entry in values["layers"]),
                texts=dict(values["texts"]) if values.get("texts") else None,
            )
            if found.statistic not in STATISTICS or not found.layers:
                raise ValueError(f"statistic {found.statistic!r} of {len(found.layers)} layers")
            return found
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BakeError(
                f"the calibration is not what bake calibrate writes: {explain(error)}"
            ) from None


def _read_layer(values: Mapping[str, Any]) -> LayerNorms:
    """Read one layer's figures; raise ValueError or KeyError for what cannot be one's."""
    found = {field.name: values[field.name] for field in fields(LayerNorms)}
    for name, value in found.items():
        kinds = (int,) if name in ("layer", "tokens", "dropped") else (int, float)
        if type(value) not in kinds or not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value!r} in layer {found['layer']!r}")
    return LayerNorms(**found)


def measure_norms(
    loaded: LanguageModel,
    site: str,
    batches: Sequence[TokenBatch],
    layers: Sequence[int],
    *,
    statistic: str = "mean",
) -> ActivationNorms:
    """Measure μ_l for `layers` (0-based); the forward stops after the last of them.

    Where several processes work together, each brings the token norms of its own batches, and all
    return the same figures.

    Raises PromptError where the prompts hold no content token, BakeError for an unknown statistic or
    an activation that is not finite.
    """
    import numpy as np

    if statistic not in STATISTICS:
        raise BakeError(f"unknown statistic {statistic!r}; one of {', '.join(STATISTICS)}")
    content = sum(int(batch.content_mask.sum()) for batch in batches)
    counts = gather((content, sum(len(batch.indices) for batch in batches)))
    if not any(tokens for tokens, _ in counts):
        raise PromptError(
            "the prompts hold no content tokens: only padding, the first token or special tokens; "
            "give longer prompts"
        )
    shares = gather(collect_token_norms(loaded, site, batches, layers))
    found = ActivationNorms(
        site=site,
        statistic=statistic,
        hidden_size=loaded.hidden_size,
        prompts=sum(prompts for _, prompts in counts),
        layers=tuple(
            summarise(layer, np.concatenate([share[layer] for share in shares])) for layer in layers
        ),
    )
    if found.warning:
        warn(found.warning)
    return found


def collect_token_norms(
    loaded: LanguageModel,
    site: str,
    batches: Sequence[TokenBatch],
    layers: Sequence[int],
) -> dict[int, np.ndarray]:
    """Return {layer: float64 norms of all content tokens}."""
    import numpy as np

    found: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}
    current: list[TokenBatch] = []

    def receive(layer: int, activation: torch.Tensor) -> None:
        check_activation(activation, current[-1].input_ids, loaded.hidden_size)
        mask = current[-1].content_mask.to(activation.device)
        norms = activation[mask].float().norm(dim=-1).double()
        found[layer].append(norms.cpu().numpy())

    last = loaded.layer(max(layers), "")
    with loaded.captured(site, list(layers), receive):
        run_layers(loaded, track(batches, "calibrating"), last, current.append)
    return {layer: np.concatenate([np.empty(0), *chunks]) for layer, chunks in found.items()}


def summarise(layer: int, norms: np.ndarray) -> LayerNorms:
    """Drop the massive activations of one layer's token norms and describe the rest."""
    import numpy as np

    if not np.isfinite(norms).all():
        raise BakeError(
            f"layer {layer} gives activations that are not finite; "
            "the base itself is broken in this dtype, try --dtype float32"
        )
    # Sorting makes the sum, and so the mean, independent of batches and prompt order to the last bit.
    norms = np.sort(norms)
    kept = norms[norms <= _massive_above(norms)]
    return LayerNorms(
        layer=layer,
        mean=float(kept.mean()),
        median=float(np.median(kept)),
        spread=float(kept.std()),
        tokens=len(kept),
        dropped=len(norms) - len(kept),
    )


def _massive_above(norms: np.ndarray) -> float:
    """Return the norm above which a layer's tokens are massive."""
    import numpy as np

    median = float(np.median(norms))
    spread = 1.4826 * float(np.median(np.abs(norms - median)))
    far = max(LEAST_OUTLIER * median, median + OUTLIER_DEVIATIONS * spread)
    return min(OUTLIER_FACTOR * median, far)
