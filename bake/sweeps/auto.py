"""The strength that suits: `--multiplier auto` inside an export.

Three questions, the cheap ones first, on one loaded model. How far can neutral text be moved? The
multiplier at which KL(base ‖ steered) reaches the target, by bisection. What does that shift? Held-out
pairs there, and at smaller ones if need be. Does it still write? One sampled check. It chooses a
multiplier and says why; that the direction works better than chance is for `bake sweep` to show.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError
from bake.io.shipped import OPENINGS, REQUESTS, tried_on
from bake.models.generation import bootstrap_interval, sample_continuations, score_continuations
from bake.support.processes import agree
from bake.sweeps.arms import Arm
from bake.sweeps.cost_curve import cost_of, cross, shorten
from bake.sweeps.design import BASE
from bake.sweeps.measurements import (
    Measurements,
    Sampling,
    Texts,
    encode_openings,
    measure_neutral,
    measure_pairs,
)
from bake.sweeps.points import Interval, Point, in_short
from bake.sweeps.summary import count_repeats, summarise
from bake.sweeps.window import Bounds, moves
from bake.texts.pair_tokens import describe_template
from bake.texts.pairs import ContrastPair
from bake.texts.prompts import read_prompts

if TYPE_CHECKING:
    import numpy as np
    import torch

    from bake.models.forward import LanguageModel
    from bake.strength.coefficients import Push

# The KL is below the window's bound because it is measured on few texts. Sampled text is a check that the
# model still writes; what it writes may be as unlikely under the base as the completions it is pushed
# towards, which are unlikely there by nature, and of short samples × 2.5 is within chance.
BOUNDS = Bounds(fluency=2.5, kl=0.7)
MOST_REPEATS = 0.2  # of a text's 3-grams, beyond the share that the base repeats
SMALLEST, LARGEST = 1 / 256, 256.0  # how far is looked
FIRST = 0.5  # what is tried first
NEAR = 0.85  # of the target is near enough
ROUNDS = 8
WEAKER = 0.7  # what is tried next where a strength shifts too little, or its text comes apart
TRIES = 4
CONTINUED, NEUTRAL, PAIRS = 6, 8, 12  # texts of each kind, at most
WRITTEN, TEMPERATURE = 20, 0.7


@dataclass(frozen=True)
class MultiplierChoice:
    """Why this multiplier: the largest net shift within the bounds, or the largest m where none is known.

    bounds: on the 95th percentile of KL on neutral text, which is the target, and on the perplexity of
    sampled text. largest: the largest |m| within the target. pairs: how many held-out pairs the shift was
    measured on. points: the figures of each multiplier that was tried, four digits of them. template: what
    `describe_template` says of the template that texts were rendered by.
    """

    multiplier: float
    largest: float
    bounds: Bounds
    pairs: int
    points: tuple[dict[str, float | None], ...]
    template: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json` and the card."""
        values = asdict(self)
        return {**values, **values.pop("template"), "reason": self.describe()}

    def describe(self) -> str:
        """Return the choice and its reason as a sentence."""
        chosen = next(point for point in self.points if point["multiplier"] == self.multiplier)
        cost = f"KL {chosen['neutral_kl_p95']:.2g} on neutral text, target {self.bounds.kl:g}"
        if not self.pairs:
            return (
                f"m = {self.multiplier:g} is the largest within the bounds ({cost}), whatever it shifts: "
                "there are no held-out pairs"
            )
        return (
            f"m = {self.multiplier:g} shifts {self.pairs} held-out pairs by {chosen['shift']:+.2g} nats a "
            f"token, the most within the bounds ({cost})"
        )


def read_trial_texts(
    direction: str | None, pairs: Sequence[ContrastPair], chat_template: str = "auto"
) -> Texts:
    """Return the first of the texts that a bake's strength is chosen on.

    direction: as the user named it; one that ships has its own neutral texts. pairs: that it was not found
    from; there may be none.
    """
    neutral = tried_on(direction).get("neutral", "neutral")
    return Texts(
        tuple(pairs[:PAIRS]),
        tuple(read_prompts(neutral)[:NEUTRAL]),
        tuple(read_prompts(OPENINGS)),
        chat_template=chat_template,
        requests=tuple(read_prompts(REQUESTS)),
    )


def choose_multiplier(
    loaded: LanguageModel,
    site: str,
    push_at: Callable[[float], Push],
    texts: Texts,
    *,
    sign: int = 1,
    bounds: Bounds = BOUNDS,
) -> MultiplierChoice:
    """Return the multiplier of a sign with the largest net shift within the bounds.

    push_at: m → push at `site`. Raises BakeError where no strength stays within the bounds, where none of
    those shifts the held-out pairs, and where sampled text comes apart at all of them.
    """
    trial = _Trial(loaded, site, push_at, texts.suited_to(loaded.tokenizer), sign, bounds)
    largest = trial.reach()
    best = trial.compare(largest) if texts.pairs else largest
    chosen = trial.check(best)
    points = trial.points()
    return MultiplierChoice(
        sign * chosen,
        sign * largest,
        bounds,
        len(texts.pairs),
        tuple(_in_short(point) for point in points),
        describe_template(loaded.tokenizer, texts.pairs, texts.chat_template),
    )


@dataclass(frozen=True)
class _Text:
    """Sampled text: each opening's nats a token under the base, the share of 3-grams that repeat."""

    nats: np.ndarray
    repeats: float


class _Trial:
    """What is known of the multipliers tried so far. A `size` is |m|, to two digits."""

    def __init__(
        self,
        loaded: LanguageModel,
        site: str,
        push_at: Callable[[float], Push],
        texts: Texts,
        sign: int,
        bounds: Bounds,
    ) -> None:
        self.loaded, self.site, self.push_at, self.texts = loaded, site, push_at, texts
        self.sign, self.bounds = sign, bounds
        self.neutral: Measurements = {}
        self.pairs: Measurements = {}
        self.fluency: dict[float, Interval] = {}
        self.costs: dict[float, float] = {}

    def reach(self) -> float:
        """Return the largest size whose KL on neutral text is within the target."""
        self._cost_of(FIRST)
        target = self.bounds.kl
        for _ in range(ROUNDS):
            within = [cost for cost in self.costs.values() if cost <= target]
            if max(within, default=0.0) >= NEAR * target:
                break
            # A little below, because what costs more than the target is of no use.
            size = shorten(cross(self.costs, (1 + NEAR) / 2 * target))
            if size in self.costs or not SMALLEST <= size <= LARGEST:
                break
            self._cost_of(size)
        inside = [size for size, cost in self.costs.items() if cost <= target]
        if not inside:
            smallest = min(self.costs)
            raise BakeError(
                f"--multiplier auto: no strength stays within the bounds: m = {self.sign * smallest:g} "
                f"moves neutral text by {self.costs[smallest]:.2g} nats (95th percentile of KL, target "
                f"{target:g}); give another --target-kl, or --multiplier M"
            )
        return max(inside)

    def compare(self, largest: float) -> float:
        """Return the size of the largest net shift; raise BakeError where none shifts the pairs.

        Weaker ones are tried where the strongest takes likelihood from the completions it is towards.
        """
        best: Point | None = None
        size = largest
        for _ in range(TRIES):
            self._shift_of(size)
            point = self._point(size)
            assert point.net_shift is not None
            assert point.shift is not None
            if (
                best is not None
                and best.net_shift
                and point.net_shift.value <= best.net_shift.value
            ):
                break
            if moves(point):
                best = point
            if point.net_shift.value >= self.sign * point.shift.value:  # Nothing is lost there.
                break
            size = shorten(size * WEAKER)
        if best is not None:
            return abs(best.arm.multiplier)
        shift = self._point(largest).shift
        assert shift is not None
        raise BakeError(
            f"--multiplier auto: no significant shift of the {len(self.texts.pairs)} held-out pairs "
            f"within KL {self.bounds.kl:g} on neutral text (at m = {self.sign * largest:g} "
            f"{shift.value:+.3f} nats a token, 95 % interval {shift.low:+.3f} to {shift.high:+.3f}); "
            "try another direction or site, or give --multiplier M"
        )

    def check(self, size: float) -> float:
        """Return the size, or the next weaker one whose sampled text holds together; raise BakeError."""
        for _ in range(TRIES):
            if size not in self.costs:
                self._cost_of(size)
            if self.texts.pairs:
                self._shift_of(size)
            why, self.fluency[size] = agree(self._sample(size))  # Every process samples it all.
            point = self._point(size)
            if why is None and moves(point):
                return size
            last, size = point.arm.multiplier, shorten(size * WEAKER)
        raise BakeError(
            f"--multiplier auto: no strength stays within the bounds (m = {last:g}: "
            f"{why or 'no significant shift of the held-out pairs'}); try another direction or site, or "
            "give --multiplier M"
        )

    def points(self) -> list[Point]:
        """Return the figures of every multiplier, from the smallest outwards."""
        return [self._point(size) for size in sorted({*self.costs, *self.fluency})]

    def _point(self, size: float) -> Point:
        base, arm = self._arms(size)
        measured = {"pairs": self.pairs, "neutral": self.neutral}
        found = {stage: values for stage, values in measured.items() if arm.name in values}
        point = summarise([base, arm], found, self.loaded.tokenizer, self.texts, Sampling())[1]
        return replace(point, fluency_ratio=self.fluency.get(size))

    def _cost_of(self, size: float) -> None:
        """Measure KL on neutral text."""
        arms = self._arms(size)
        self.neutral |= measure_neutral(
            self.loaded, arms, self.texts.neutral, chat_template=self.texts.chat_template
        )
        self.costs[size] = cost_of(self.neutral[arms[-1].name]["kl"])

    def _shift_of(self, size: float) -> None:
        """Measure the likelihood of held-out pairs, once; of the base with the first."""
        arms = self._arms(size)
        if arms[-1].name in self.pairs:
            return
        arms = arms[1:] if self.pairs else arms
        self.pairs |= measure_pairs(
            self.loaded, arms, self.texts.pairs, chat_template=self.texts.chat_template
        )

    def _sample(self, size: float) -> tuple[str | None, Interval]:
        """Continue openings; say what is wrong with the text, None where it holds together, and its
        perplexity × the base's.
        """
        base, own = self._base_text, self._write(self._arms(size)[1].push)
        ratios = own.nats - base.nats

        def ratio(rows: Any) -> float:
            return math.exp(min(float(ratios[rows].mean()), 700.0))

        low, high = bootstrap_interval(ratio, len(ratios))
        found = Interval(ratio(slice(None)), low, high)
        bound = max(self.bounds.fluency, self._wanted_ratio(base))
        why = None
        if found.value > bound:
            why = f"sampled text's perplexity is × {found.value:.2f} (bound {bound:.2g})"
        elif own.repeats > base.repeats + MOST_REPEATS:
            shares = f"{own.repeats:.0%} of sampled text repeats itself, and {base.repeats:.0%}"
            why = f"{shares} of the base's"
        return why, found

    def _wanted_ratio(self, base: _Text) -> float:
        """Return the perplexity, under the base, of completions it is pushed to, × its own text's."""
        if not self.texts.pairs:
            return 0.0
        scores = self.pairs[BASE]["positive" if self.sign > 0 else "negative"]
        nats, tokens = map(sum, zip(*scores, strict=True))
        return math.exp(nats / tokens - float(base.nats.mean()))

    @cached_property
    def _base_text(self) -> _Text:
        return self._write({})

    @cached_property
    def _prompts(self) -> list[tuple[int, ...]]:
        """The openings to continue, as far as possible of one length, so that they share a batch."""
        encoded = encode_openings(
            self.loaded.tokenizer, self.texts.openings, self.texts.chat_template
        )
        counts = Counter(map(len, encoded))
        return sorted(encoded, key=lambda ids: (-counts[len(ids)], len(ids)))[:CONTINUED]

    def _write(self, push: Mapping[int, torch.Tensor]) -> _Text:
        """Continue the openings under a push, and score what was written under the base."""
        import numpy as np

        with self.loaded.steered(self.site, push):
            drawn = sample_continuations(
                self.loaded, self._prompts, new_tokens=WRITTEN, temperature=TEMPERATURE
            )
        nats = score_continuations(self.loaded, self._prompts, drawn)
        repeated, grams = np.sum([count_repeats(ids) for ids in drawn], axis=0)
        return _Text(np.array(nats) / WRITTEN, float(repeated / grams))

    def _arms(self, size: float) -> list[Arm]:
        """Return the base and an arm for a multiplier."""
        multiplier = self.sign * size
        push = self.push_at(multiplier)
        name, band, vectors = f"m={multiplier:+g}", push.band, push.vectors
        arm = Arm(name, "direction", multiplier, self.site, push.law, band, push=vectors)
        return [Arm(BASE, "base"), arm]


def _in_short(point: Point) -> dict[str, float | None]:
    return {
        "multiplier": point.arm.multiplier,
        "shift": in_short(point.shift),
        "net_shift": in_short(point.net_shift),
        "fluency_ratio": in_short(point.fluency_ratio),
        "neutral_kl_p95": in_short(point.neutral_kl.get("p95")),
    }
