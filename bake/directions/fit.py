"""Find a direction from contrast pairs: difference of means, principal component or linear probe.

Activations come in as `activations` read them; what is fitted to them here is a pure function of
them. Sources: difference of means, Contrastive Activation Addition (arXiv 2312.06681); principal
component of paired differences, Representation Engineering (arXiv 2310.01405) as the repeng package
defines `pca_diff`; linear probe, "Discovering Latent Knowledge" and after it most of the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bake.directions.activations import TOKENS, PairActivations
from bake.directions.direction import normalise
from bake.errors import DirectionError
from bake.texts.pairs import ContrastPair, read_pairs

if TYPE_CHECKING:
    import torch

METHODS = ("mean", "pca", "probe")
PROBE_ITERATIONS = 1000
# A principal component of almost nothing would be rounding noise: relative to the activations' size.
_FLAT = 1e-6


def check_method(method: str, methods: Sequence[str] = METHODS) -> None:
    """Raise DirectionError for a method that is none of `methods`."""
    if method not in methods:
        raise DirectionError(f"unknown method {method!r}; one of {', '.join(methods)}")


def fit_directions(read: PairActivations, method: str) -> dict[int, torch.Tensor]:
    """Return {layer: unit (hidden_size,) float32} of the activations of pairs, by `method`."""
    check_method(method)
    fit = {"mean": _mean, "pca": _principal_component, "probe": _probe}[method]
    return {layer: fit(read, layer) for layer in read.layers}


def _mean(read: PairActivations, layer: int) -> torch.Tensor:
    return normalise(
        read.differences(layer).mean(dim=0), f"the difference of means at layer {layer}"
    )


def _principal_component(read: PairActivations, layer: int) -> torch.Tensor:
    """The first principal component of positive − negative, centred over the pairs as repeng's PCA is.

    Its sign is the one for which most pairs' positive text projects higher than their negative one, as
    in repeng; where the pairs are divided, the mean projection decides.
    """
    import torch

    name = f"the principal component at layer {layer}"
    differences = read.differences(layer)
    mean = differences.mean(dim=0)
    centred = differences - mean
    if not bool(centred.isfinite().all()):
        return normalise(centred.sum(dim=0), name)  # Says what is wrong with it.
    scale = max(float(differences.norm()), float(read.norms[layer].norm()))
    if float(centred.norm()) <= _FLAT * scale:
        raise DirectionError(
            f"{name} does not exist: the pairs' differences are all alike; give more pairs, or take "
            "--method mean"
        )
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    component = components[0]
    votes = float((differences @ component).sign().sum())
    return normalise(-component if (votes or float(mean @ component)) < 0 else component, name)


def _probe(read: PairActivations, layer: int) -> torch.Tensor:
    """The weights of a logistic regression on standardised features, mapped back: w / σ."""
    import warnings

    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    positive, negative = read.positive[layer].double(), read.negative[layer].double()
    features = np.concatenate([positive.numpy(), negative.numpy()])
    name = f"the probe at layer {layer}"
    if not np.isfinite(features).all():
        return normalise(read.differences(layer).sum(dim=0), name)  # Says what is wrong with it.
    spread = features.std(axis=0)
    # A feature that never moves carries nothing; dividing by its rounding noise would say otherwise.
    spread[spread <= _FLAT * np.abs(features).max()] = np.inf
    labels = np.repeat([1, 0], len(positive))
    probe = LogisticRegression(max_iter=PROBE_ITERATIONS, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            probe.fit((features - features.mean(axis=0)) / spread, labels)
        except ConvergenceWarning:
            raise DirectionError(
                f"{name} does not converge in {PROBE_ITERATIONS} iterations; take --method mean"
            ) from None
    import torch

    return normalise(torch.from_numpy(probe.coef_[0] / spread), name)


__all__ = [
    "METHODS",
    "TOKENS",
    "ContrastPair",
    "check_method",
    "fit_directions",
    "read_pairs",
]
