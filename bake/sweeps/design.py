"""What a sweep compares: variants of pushing, multipliers, controls; and the arms that follow.

Every arm's push comes from the same laws and norms as a bake's, so what a sweep says of m holds for
`bake export --multiplier m`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bake.directions.direction import Direction
from bake.strength.coefficients import DEFAULT_BAND, DEFAULT_LAW, Push, band_layers, compute_push
from bake.sweeps.arms import Arm, Injection
from bake.sweeps.controls import random_direction
from bake.sweeps.measurements import Sampling
from bake.sweeps.window import Bounds

MULTIPLIERS = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
CONTROL_SEEDS = 8
BASE = "base"


@dataclass(frozen=True)
class Variant:
    """One way of pushing that is swept over all multipliers."""

    site: str = "mlp_out"
    law: str = DEFAULT_LAW
    band: tuple[float, float] = DEFAULT_BAND
    injection: Injection = "broadcast"


@dataclass(frozen=True)
class Design:
    """What a sweep compares. The first variant is the one that the window and the controls are for.

    multipliers: without 0, which is the base and always there. instruction: a prompt that asks for
    the same shift in words, to compare with.
    """

    variants: tuple[Variant, ...] = (Variant(),)
    multipliers: tuple[float, ...] = MULTIPLIERS
    control_seeds: int = CONTROL_SEEDS
    instruction: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    bounds: Bounds = field(default_factory=Bounds)

    def label(self, variant: Variant) -> str:
        """Return what distinguishes a variant from the first; "" for the first."""
        first = self.variants[0]
        parts = {
            "site": variant.site,
            "law": variant.law,
            "band": "{:g}:{:g}".format(*(100 * share for share in variant.band)),
            "injection": variant.injection,
        }
        return " ".join(
            text for name, text in parts.items() if getattr(variant, name) != getattr(first, name)
        )


def make_arms(
    direction: Direction,
    design: Design,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    hidden_size: int,
) -> list[Arm]:
    """Return every arm, the base first. norms: {site: {layer: μ_l}}, see `compute_variant_push`."""
    arms = [Arm(BASE, "base")]
    for variant in design.variants:
        label = design.label(variant)
        for multiplier in design.multipliers:
            push = compute_variant_push(
                direction, variant, norms, layer_count, hidden_size, multiplier
            )
            arms.append(
                Arm(
                    f"{label} m={multiplier:+g}".strip(),
                    "direction",
                    multiplier,
                    variant.site,
                    variant.law,
                    push.band,
                    variant.injection,
                    push.vectors,
                    variant=label,
                )
            )
    first = design.variants[0]
    layers = pushed_layers(first, norms, layer_count)
    for seed in range(design.control_seeds):
        drawn = random_direction(direction, layers, hidden_size, seed)
        for size in sorted({abs(m) for m in design.multipliers}):
            push = compute_variant_push(drawn, first, norms, layer_count, hidden_size, size)
            arms.append(
                Arm(
                    f"random {seed} m={size:g}",
                    "random",
                    size,
                    first.site,
                    first.law,
                    push.band,
                    push=push.vectors,
                    seed=seed,
                )
            )
    if design.instruction:
        arms.append(Arm("instruction", "prompt", instruction=design.instruction))
    return arms


def compute_variant_push(
    direction: Direction,
    variant: Variant,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    hidden_size: int,
    multiplier: float = 1.0,
) -> Push:
    """Return a variant's push at m. norms: {site: {layer: μ_l}} of every layer that can be pushed."""
    layers = pushed_layers(variant, norms, layer_count)
    return compute_push(
        {layer: norms[variant.site][layer] for layer in layers},
        direction.select(layers, hidden_size),
        hidden_size=hidden_size,
        multiplier=multiplier,
        law=variant.law,
    )


def pushed_layers(
    variant: Variant, norms: Mapping[str, Mapping[int, float]], layer_count: int
) -> list[int]:
    """Return the layers of a variant's band that can be pushed at its site."""
    return [
        layer for layer in band_layers(layer_count, variant.band) if layer in norms[variant.site]
    ]
