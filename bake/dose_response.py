"""Strength: sweeps over multipliers with their controls, and the window in which a direction is usable.

Hooks, not bakes: one load of the model serves the whole sweep. Every arm's push comes from the same
laws and norms as a bake's, so what a sweep says of m holds for `bake export --multiplier m`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.arms import Arm, Injection
from bake.coefficients import DEFAULT_BAND, DEFAULT_LAW, band_layers, compute_push
from bake.direction import Direction
from bake.errors import OutputError
from bake.model import LoadedModel
from bake.norms import measure_norms
from bake.progress import announce
from bake.prompts import encode, make_batches
from bake.response import (
    Measurements,
    Point,
    Sampling,
    Scorer,
    Texts,
    measure_neutral,
    measure_pairs,
    measure_rollouts,
    summarise,
)
from bake.sites import LayerStructure

if TYPE_CHECKING:
    import torch

MULTIPLIERS = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0)
CONTROL_SEEDS = 8
BASE = "base"
KEPT_SAMPLES = 12  # openings whose continuations the report shows
MEASUREMENTS_FILE, REPORT_FILE = "measurements.json", "report.json"


@dataclass(frozen=True)
class Variant:
    """One way of pushing that is swept over all multipliers."""

    site: str = "mlp_out"
    law: str = DEFAULT_LAW
    band: tuple[float, float] = DEFAULT_BAND
    injection: Injection = "broadcast"


@dataclass(frozen=True)
class Bounds:
    """What a push may cost: sampled text's perplexity ratio; 95th percentile KL on neutral text, nats."""

    fluency: float = 1.5
    kl: float = 1.0


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


@dataclass(frozen=True)
class Window:
    """The multipliers of one sign that stay within the bounds, from 0 outwards without a gap.

    largest: the largest |m| measured inside, with its sign; best: the m in it with the largest shift
    that way, or the largest where no shift was measured. Both are None where even the smallest costs
    too much. reason: what ends the window.
    """

    sign: int
    largest: float | None
    best: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Specificity:
    """A direction's shift beside that of random directions of the same norm, nats a token.

    The largest of the random shifts grows with the number of seeds; their root mean square does not.
    """

    multiplier: float
    shift: float
    seeds: int
    largest: float
    rms: float

    @property
    def ratio(self) -> float:
        """|shift| over the largest of the random ones."""
        return abs(self.shift) / self.largest

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "ratio": self.ratio, "ratio_rms": abs(self.shift) / self.rms}

    def describe(self) -> str:
        """Return the comparison as a sentence."""
        return (
            f"at m = {self.multiplier:g} the direction shifts {self.ratio:.1f} × the largest of "
            f"{self.seeds} random directions of the same norm ({self.largest:.3f}), and "
            f"{abs(self.shift) / self.rms:.1f} × their root mean square ({self.rms:.3f}), which does "
            f"not grow with the number of seeds"
        )


@dataclass(frozen=True)
class DoseResponse:
    """What a sweep found. points begin with the base. samples: [{opening, texts: {arm: text}}]."""

    points: tuple[Point, ...]
    windows: tuple[Window, ...]
    norms: Mapping[int, float]
    coefficients: Mapping[int, float]
    design: Design
    samples: tuple[Mapping[str, Any], ...] = ()

    def point(self, name: str) -> Point:
        """Return the point of an arm by its name."""
        return next(point for point in self.points if point.arm.name == name)

    def curve(self, variant: Variant | None = None) -> list[Point]:
        """Return the base and one variant's points in the order of their multipliers."""
        label = self.design.label(variant) if variant else ""
        chosen = [
            point
            for point in self.points
            if point.arm.kind == "direction" and point.arm.variant == label
        ]
        return sorted([self.points[0], *chosen], key=lambda point: point.arm.multiplier)

    @property
    def controls(self) -> list[Point]:
        """The random directions' points."""
        return [point for point in self.points if point.arm.kind == "random"]

    @property
    def specificity(self) -> Specificity | None:
        """What chance does at the multiplier nearest to 1; None where no control was run."""
        curve = [point for point in self.curve() if point.arm.kind == "direction"]
        own = min(curve, key=lambda point: abs(point.arm.multiplier - 1), default=None)
        if own is None or own.shift is None:
            return None
        size = abs(own.arm.multiplier)
        shifts = [c.shift.value for c in self.controls if c.shift and c.arm.multiplier == size]
        if not any(shifts):
            return None
        return Specificity(
            own.arm.multiplier,
            own.shift.value,
            len(shifts),
            max(abs(shift) for shift in shifts),
            math.sqrt(math.fsum(shift**2 for shift in shifts) / len(shifts)),
        )

    def laws_at_equal_shift(self) -> dict[str, float]:
        """Return {law: fluency ratio} at the shift that the first variant has at m nearest 1.

        Only of variants that differ from the first in nothing but their law.
        """
        first = self.design.variants[0]
        own = [point for point in self.curve() if point.arm.multiplier > 0 and point.shift]
        if not own:
            return {}
        nearest = min(own, key=lambda point: abs(point.arm.multiplier - 1))
        assert nearest.shift is not None
        costs = {
            variant.law: _fluency_at(self.curve(variant), nearest.shift.value)
            for variant in self.design.variants
            if replace(variant, law=first.law) == first
        }
        return {law: cost for law, cost in costs.items() if cost is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `report.json` and `--json`."""
        return {
            "version": 1,
            "design": asdict(self.design),
            "activation_norms": {str(layer): value for layer, value in self.norms.items()},
            "coefficients": {str(layer): value for layer, value in self.coefficients.items()},
            "points": [point.to_dict() for point in self.points],
            "windows": [window.to_dict() for window in self.windows],
            "specificity": self.specificity.to_dict() if self.specificity else None,
            "fluency_at_equal_shift": self.laws_at_equal_shift(),
            "samples": list(self.samples),
        }


def compare_laws(costs: Mapping[str, float]) -> str:
    """Return what each law costs at equal shift, and which the least, as a sentence."""
    listed = ", ".join(f"{law} × {cost:.3f}" for law, cost in costs.items())
    return (
        f"sampled text's perplexity is {listed}; "
        f"{min(costs, key=lambda law: costs[law])} costs the least"
    )


def make_arms(
    direction: Direction,
    design: Design,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    hidden_size: int,
) -> list[Arm]:
    """Return every arm, the base first. norms: {site: {layer: μ_l}} for every layer of every band."""
    arms = [Arm(BASE, "base")]
    for variant in design.variants:
        label = design.label(variant)
        for multiplier in design.multipliers:
            push, band = _push(direction, variant, multiplier, norms, layer_count, hidden_size)
            arms.append(
                Arm(
                    f"{label} m={multiplier:+g}".strip(),
                    "direction",
                    multiplier,
                    variant.site,
                    variant.law,
                    band,
                    variant.injection,
                    push,
                    variant=label,
                )
            )
    first = design.variants[0]
    for seed in range(design.control_seeds):
        layers = band_layers(layer_count, first.band)
        drawn = random_direction(direction, layers, hidden_size, seed)
        for multiplier in sorted({abs(m) for m in design.multipliers}):
            push, band = _push(drawn, first, multiplier, norms, layer_count, hidden_size)
            name = f"random {seed} m={multiplier:g}"
            arms.append(
                Arm(name, "random", multiplier, first.site, first.law, band, push=push, seed=seed)
            )
    if design.instruction:
        arms.append(Arm("instruction", "prompt", instruction=design.instruction))
    return arms


def random_direction(
    like: Direction, layers: Sequence[int], hidden_size: int, seed: int
) -> Direction:
    """Return the direction turned at random: other vectors, the same cosines between layers.

    A push adds up over depth as far as its layers agree, so chance must agree over depth alike. The
    layers' vectors are C·B with orthonormal rows B; B is replaced by random orthonormal rows, drawn
    from what is orthogonal to B: in a narrow model a random vector holds a good part of any other.
    """
    import torch

    stacked = torch.stack([like.layer(layer).double() for layer in layers])
    _, singular, right = torch.linalg.svd(stacked, full_matrices=False)
    kept = int((singular > 1e-9 * singular[0]).sum())
    generator = torch.Generator().manual_seed(seed)
    basis = right[:kept].T
    drawn = torch.randn(hidden_size, kept, generator=generator, dtype=torch.float64)
    drawn = drawn - basis @ (basis.T @ drawn)
    turned = stacked @ basis @ torch.linalg.qr(drawn).Q.T
    vectors: dict[int | None, torch.Tensor] = {
        layer: (row / row.norm()).float() for layer, row in zip(layers, turned, strict=True)
    }
    return replace(like, vectors=vectors)


def _push(
    direction: Direction,
    variant: Variant,
    multiplier: float,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    hidden_size: int,
) -> tuple[dict[int, torch.Tensor], tuple[int, int]]:
    layers = band_layers(layer_count, variant.band)
    push = compute_push(
        {layer: norms[variant.site][layer] for layer in layers},
        direction.select(layers, hidden_size),
        hidden_size=hidden_size,
        multiplier=multiplier,
        law=variant.law,
    )
    return push.vectors, push.band


def measure_sites(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    sites: Sequence[str],
    prompts: Sequence[str],
    layer_count: int,
) -> dict[str, dict[int, float]]:
    """Return {site: {layer: μ_l}} of every layer."""
    batches = make_batches(encode(tokenizer, prompts))
    return {
        site: dict(measure_norms(loaded, structure, site, batches, range(layer_count)).values())
        for site in dict.fromkeys(sites)
    }


def run_sweep(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    direction: Direction,
    design: Design,
    texts: Texts,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    *,
    folder: Path | None = None,
    scorer: Scorer | None = None,
) -> DoseResponse:
    """Measure every arm and summarise. With a folder, what is measured is kept there as it is made.

    norms: from `measure_sites`. A sweep of the same design that was interrupted goes on where it
    stopped.
    """
    arms = make_arms(direction, design, norms, layer_count, loaded.hidden_size)
    store = _Store(folder, _fingerprint(arms, design, texts))
    sampled = [arm for arm in arms if arm.kind != "random"]
    given = loaded, structure, tokenizer
    measured: dict[str, Measurements] = {
        "pairs": store.keep("pairs", lambda: measure_pairs(*given, arms, texts.pairs)),
        "neutral": store.keep("neutral", lambda: measure_neutral(*given, arms, texts.neutral)),
        "rollouts": store.keep(
            "rollouts",
            lambda: measure_rollouts(*given, sampled, texts.openings, design.sampling),
        ),
    }
    points = summarise(arms, measured, tokenizer, texts, design.sampling, scorer)
    first = design.variants[0]
    unit = _unit_coefficients(direction, first, norms, layer_count, loaded.hidden_size)
    found = DoseResponse(
        points,
        (),
        dict(norms[first.site]),
        unit,
        design,
        tuple(_collect_samples(sampled, measured["rollouts"], texts, tokenizer, design.sampling)),
    )
    return replace(found, windows=tuple(find_windows(found.curve(), design.bounds)))


def _unit_coefficients(
    direction: Direction,
    variant: Variant,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    hidden_size: int,
) -> dict[int, float]:
    layers = band_layers(layer_count, variant.band)
    push = compute_push(
        {layer: norms[variant.site][layer] for layer in layers},
        direction.select(layers, hidden_size),
        hidden_size=hidden_size,
        law=variant.law,
    )
    return {entry.layer: entry.coefficient for entry in push.layers}


def _collect_samples(
    arms: Sequence[Arm],
    rollouts: Measurements,
    texts: Texts,
    tokenizer: Any,
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    for index, opening in enumerate(texts.openings[:KEPT_SAMPLES]):
        written = {
            arm.name: tokenizer.decode(
                rollouts[arm.name]["ids"][index * sampling.samples], skip_special_tokens=True
            )
            for arm in arms
            if arm.name in rollouts
        }
        yield {"opening": opening, "texts": written}


def find_windows(curve: Sequence[Point], bounds: Bounds) -> Iterator[Window]:
    """Yield the window of each sign that the curve has. curve: one variant's points and the base."""
    for sign in (-1, 1):
        outwards = sorted(
            (point for point in curve if point.arm.multiplier * sign > 0),
            key=lambda point: abs(point.arm.multiplier),
        )
        if not outwards:
            continue
        inside: list[Point] = []
        reason = "every strength that was measured is within the bounds"
        for point in outwards:
            exceeded = _exceeds(point, bounds)
            if exceeded:
                reason = f"m = {point.arm.multiplier:+g}: {exceeded}"
                break
            inside.append(point)
        best = max(
            inside,
            key=lambda p: sign * p.shift.value if p.shift else abs(p.arm.multiplier),
            default=None,
        )
        yield Window(
            sign,
            inside[-1].arm.multiplier if inside else None,
            best.arm.multiplier if best else None,
            reason,
        )


def _exceeds(point: Point, bounds: Bounds) -> str | None:
    """Say which bound a point breaks; a figure that is not a number breaks it."""
    ratio = point.fluency_ratio
    if ratio is not None and not ratio.value <= bounds.fluency:
        return f"sampled text's perplexity is × {ratio.value:.2f} (bound {bounds.fluency:g})"
    kl = point.neutral_kl.get("p95")
    if kl is not None and not kl.value <= bounds.kl:
        return f"95th percentile KL on neutral text is {kl.value:.2f} nats (bound {bounds.kl:g})"
    return None


def _fluency_at(curve: Sequence[Point], shift: float) -> float | None:
    """Return the fluency ratio at which a curve reaches a shift; log-linear between points."""
    ordered = [
        (point.shift.value, math.log(point.fluency_ratio.value))
        for point in curve
        if point.arm.multiplier >= 0 and point.shift and point.fluency_ratio
    ]
    for (low, left), (high, right) in pairwise(ordered):
        if min(low, high) <= shift <= max(low, high) and high != low:
            return math.exp(left + (shift - low) / (high - low) * (right - left))
    return None


def _fingerprint(arms: Sequence[Arm], design: Design, texts: Texts) -> str:
    """Return a hash of everything that decides the measurements."""
    digest = hashlib.sha256()
    for arm in arms:
        digest.update(json.dumps(arm.to_dict(), sort_keys=True).encode())
        for layer, vector in sorted(arm.push.items()):
            digest.update(str(layer).encode())
            digest.update(vector.float().numpy().tobytes())
    digest.update(json.dumps(asdict(design.sampling)).encode())
    for value in (texts.neutral, texts.openings, [asdict(pair) for pair in texts.pairs]):
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


class _Store:
    """Keeps a sweep's measurements in a file, stage by stage, for a run that comes after a break."""

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.path = folder / MEASUREMENTS_FILE if folder else None
        self.values: dict[str, Any] = {"fingerprint": fingerprint}
        if self.path is not None and self.path.exists():
            try:
                before = json.loads(self.path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                before = {}
            if before.get("fingerprint") == fingerprint:
                self.values = before

    def keep(self, stage: str, measure: Any) -> Measurements:
        """Return a stage's measurements, from the file if it has them."""
        if stage in self.values:
            announce(f"{stage}: measured before, taken from {MEASUREMENTS_FILE}")
        else:
            self.values[stage] = measure()
            self._write()
        found: Measurements = self.values[stage]
        return found

    def _write(self) -> None:
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(self.values), encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}") from None
