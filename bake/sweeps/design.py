"""What a sweep compares: variants of pushing, multipliers, controls; and the arms that follow.

Every arm's push comes from the same laws and norms as a bake's, so what a sweep says of m holds for
`bake export --multiplier m`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from bake.directions.direction import Direction
from bake.directions.subspace import of_layer, span
from bake.strength.coefficients import DEFAULT_BAND, DEFAULT_LAW, Push, band_layers, compute_push
from bake.sweeps.arms import Arm, Injection
from bake.sweeps.controls import random_direction
from bake.sweeps.measurements import Sampling
from bake.sweeps.window import Bounds
from bake.writes import Ablation, MappedAblation, WriteMap

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
class AblationVariant:
    """One way of taking the direction out instead of adding it.

    scope: as of `bake.writes.Ablation`. strength, band: of `writes`. from_layer: the layer whose vector is
    taken out everywhere; None where the direction has one for all, or each layer's writes lose their own.
    """

    scope: str = "stream"
    strength: float = 1.0
    band: tuple[float, float] = DEFAULT_BAND
    from_layer: int | None = None

    @property
    def name(self) -> str:
        """What its arm is called."""
        whose = "" if self.from_layer is None else f", layer {self.from_layer}"
        if self.scope == "stream":
            return f"ablated{whose}"
        band = "{:g}:{:g}".format(*(100 * share for share in self.band))
        return f"ablated writes {band} s={self.strength:g}{whose}"

    def layers(self, layer_count: int) -> list[int]:
        """Return the layers whose writes change."""
        if self.scope == "stream":
            return list(range(layer_count))
        return list(band_layers(layer_count, self.band))

    def remove(self, direction: Direction, layer_count: int, hidden_size: int) -> Ablation:
        """Return what is taken out. Raises DirectionError where the direction lacks a layer."""
        chosen = direction if self.from_layer is None else of_layer(direction, self.from_layer)
        basis = span([chosen], self.layers(layer_count), hidden_size)
        return Ablation(basis, self.scope, self.strength)

    def randomize(
        self, direction: Direction, layer_count: int, hidden_size: int, seed: int
    ) -> Ablation:
        """Return the same of a random direction."""
        one = self.from_layer or 0
        alone = self.scope == "stream" or self.from_layer is not None
        layers = [one] if alone else self.layers(layer_count)
        drawn = random_direction(direction, layers, hidden_size, seed)
        chosen = of_layer(drawn, one) if alone else drawn
        return replace(self, from_layer=None).remove(chosen, layer_count, hidden_size)


@dataclass(frozen=True)
class Design:
    """What a sweep compares. The first variant is the one that the window and the controls are for.

    multipliers: without 0, which is the base and always there. instruction: a prompt that asks for
    the same shift in words, to compare with. ablations: ways of taking the direction out, each with
    `control_seeds` random directions beside it.
    """

    variants: tuple[Variant, ...] = (Variant(),)
    multipliers: tuple[float, ...] = MULTIPLIERS
    control_seeds: int = CONTROL_SEEDS
    instruction: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    bounds: Bounds = field(default_factory=Bounds)
    ablations: tuple[AblationVariant, ...] = ()

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
    writes: WriteMap | None = None,
) -> list[Arm]:
    """Return every arm, the base first. norms: {site: {layer: μ_l}}, see `compute_variant_push`.

    writes: what writes to the residual stream; None where nothing is taken out.
    """
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
    if writes is not None:
        arms += make_ablation_arms(direction, design, layer_count, hidden_size, writes)
    if design.instruction:
        arms.append(Arm("instruction", "prompt", instruction=design.instruction))
    return arms


def make_ablation_arms(
    direction: Direction,
    design: Design,
    layer_count: int,
    hidden_size: int,
    writes: WriteMap,
) -> Iterator[Arm]:
    """Yield an arm for each ablation, and those of random directions beside it."""
    for variant in design.ablations:
        size = -variant.strength
        band = variant.layers(layer_count)[0], variant.layers(layer_count)[-1] + 1
        removal = MappedAblation(writes, variant.remove(direction, layer_count, hidden_size))
        yield Arm(variant.name, "ablation", size, band=band, removal=removal)
        for seed in range(design.control_seeds):
            drawn = variant.randomize(direction, layer_count, hidden_size, seed)
            yield Arm(
                f"random {seed} {variant.name}",
                "random ablation",
                size,
                band=band,
                seed=seed,
                variant=variant.name,
                removal=MappedAblation(writes, drawn),
            )


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
