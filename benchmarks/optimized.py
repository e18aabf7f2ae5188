"""What an optimised direction gains over the difference of means, on text that neither has seen.

    python benchmarks/optimized.py [--pairs 300] [--seeds 3]

On the model that ships. Both directions are found from its 120 pairs. The defaults of `--method optimize`
were chosen with its held-out pairs in view, so both are tried on others: pairs and neutral documents that
the model's grammar writes, of a seed that nothing else uses. Each push is scaled until it costs the same KL
from the base on the neutral text; what is compared is the margin, the completions' log-likelihood a token,
cheerful − gloomy, in nats. `mean` is found at the token position that serves it better. Optimised vectors
keep the proportions of their lengths (`--keep-scale`), the difference of means has the default law's.
Intervals are 95 % bootstrap intervals over pairs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

SEED = 3_000_000  # bake/demo/train.py has those of the model's own text
COSTS = (0.01, 0.03, 0.1)  # nats a token of neutral text
PUSHED = "m=+1"
SMALLEST, LARGEST, HALVINGS = 0.01, 10.0, 14  # multipliers that are tried

Push = dict[int, Any]


def main() -> None:
    """Find the directions, let each cost the same, and print what that buys."""
    import torch
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=300, help="fresh pairs (300)")
    parser.add_argument("--documents", type=int, default=64, help="fresh neutral documents (64)")
    parser.add_argument("--seeds", type=int, default=3, help="optimisations (3)")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    trial = Trial(options.pairs, options.documents)
    means = {token: trial.find_mean(token) for token in ("last", "mean")}
    optimised = [trial.find_optimised(seed) for seed in range(options.seeds)]
    base = trial.margins({})
    for cost in COSTS:
        spent = {token: trial.spend(push, cost) for token, push in means.items()}
        best = max(spent, key=lambda token: sum(spent[token]))
        print(f"\nKL {cost:g} nats a token of neutral text")
        print(f"  mean ({best} token)    shift {describe(subtract(spent[best], base))}")
        for seed, push in enumerate(optimised):
            margins = trial.spend(push, cost)
            print(
                f"  optimize, seed {seed}    shift {describe(subtract(margins, base))}, "
                f"further by {describe(subtract(margins, spent[best]))}"
            )


class Trial:
    """The model that ships, what directions are found from, and the fresh text they are tried on."""

    def __init__(self, pairs: int, documents: int) -> None:
        from bake.anatomy.base import load_base, open_base
        from bake.strength.coefficients import band_layers
        from bake.demo.grammar import generate_documents, generate_pairs
        from bake.texts.pairs import ContrastPair
        from bake.io.shipped import DEMO_NAME

        base = open_base(DEMO_NAME)
        self.loaded, self.layers = load_base(base), band_layers(base.anatomy.layer_count)
        fresh = [ContrastPair(*pair) for pair in generate_pairs(pairs, SEED)]
        self.pairs = fresh
        texts = [d.text for d in generate_documents(4 * documents, SEED) if d.mood == "neutral"]
        self.neutral = texts[:documents]

    def find(self, **options: Any) -> Any:
        """Return a direction of the shipped pairs, found as `bake direction` does."""
        from bake.directions.extract import ExtractionOptions, extract
        from bake.texts.pairs import read_pairs

        return extract(
            self.loaded,
            "mlp_out",
            read_pairs("toy-cheerful-gloomy"),
            self.layers,
            ExtractionOptions(neutral="toy-neutral", **options),
        )

    def find_mean(self, token: str) -> Push:
        """Return the difference of means, as long as the default law makes it at m = 1."""
        direction = self.find(token=token)
        size = self.loaded.hidden_size**0.5
        return {layer: direction.layer(layer) * self.norms[layer] / size for layer in self.layers}

    def find_optimised(self, seed: int) -> Push:
        """Return what gradient descent found, as long as it came out."""
        from bake.directions.direction_file import direction_bytes, load_direction

        direction = self.find(method="optimize", seed=seed)
        with tempfile.TemporaryDirectory(prefix="bake-optimized-") as folder:
            file = Path(folder) / "direction.safetensors"
            file.write_bytes(direction_bytes(direction))
            lengths = load_direction(file).own_lengths(self.layers)
        return {layer: direction.layer(layer) * lengths[layer] for layer in self.layers}

    @cached_property
    def norms(self) -> dict[int, float]:
        """Activation norms on neutral text, {layer: μ}."""
        from bake.strength.norms import measure_norms
        from bake.texts.prompts import read_prompts

        batches = self.loaded.batches(read_prompts("toy-neutral"))
        found = measure_norms(self.loaded, "mlp_out", batches, self.layers)
        return {entry.layer: entry.mean for entry in found.layers}

    def margins(self, push: Push) -> list[float]:
        """Return the margin of every fresh pair under a push."""
        from bake.sweeps.measurements import measure_pairs

        found = measure_pairs(self.loaded, self._arms(push), self.pairs)[PUSHED]
        positive, negative = (
            [-nats / tokens for nats, tokens in found[side]] for side in ("positive", "negative")
        )
        return subtract(positive, negative)

    def spend(self, push: Push, cost: float) -> list[float]:
        """Return the fresh pairs' margins under the push, scaled until it costs this much."""
        low, high = SMALLEST, LARGEST
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            found = self._divergence(scale(push, middle))
            low, high = (middle, high) if found < cost else (low, middle)
        return self.margins(scale(push, low))

    def _divergence(self, push: Push) -> float:
        """Return the mean KL of neutral text, in nats a token."""
        from bake.sweeps.measurements import measure_neutral

        found = measure_neutral(self.loaded, self._arms(push), self.neutral)[PUSHED]["kl"]
        values = [value for text in found for value in text]
        return sum(values) / len(values)

    @staticmethod
    def _arms(push: Push) -> list[Any]:
        from bake.sweeps.arms import Arm

        return [Arm("base", "base"), Arm(PUSHED, "direction", 1.0, "mlp_out", push=push)]


def scale(push: Push, multiplier: float) -> Push:
    """Return the push, this much longer."""
    return {layer: vector * multiplier for layer, vector in push.items()}


def subtract(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return the differences, pair by pair."""
    return [a - b for a, b in zip(one, other, strict=True)]


def describe(values: Sequence[float]) -> str:
    """Return the mean with its bootstrap interval."""
    import numpy as np

    from bake.models.generation import bootstrap_interval

    array = np.array(values)
    low, high = bootstrap_interval(lambda chosen: float(array[chosen].mean()), len(array), seed=0)
    return f"{array.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
