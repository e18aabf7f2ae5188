"""The strength that suits: a short sweep inside an export, for `--multiplier auto`.

The same measurements and the same window as `bake sweep`, on fewer texts, on the positive side only
and without controls: it chooses a multiplier and says why, it does not show that the direction works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bake.errors import BakeError
from bake.io.shipped import tried_on
from bake.sweeps.arms import Arm
from bake.sweeps.design import BASE
from bake.sweeps.measurements import (
    Sampling,
    Texts,
    measure_neutral,
    measure_pairs,
    measure_rollouts,
)
from bake.sweeps.points import Interval, Point
from bake.sweeps.summary import summarise
from bake.sweeps.window import Bounds, find_windows
from bake.texts.pair_tokens import describe_template
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts

if TYPE_CHECKING:
    from bake.models.forward import LanguageModel
    from bake.strength.coefficients import Push

AUTO_MULTIPLIERS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
SMALLEST, LARGEST = 1 / 32, 32.0  # how far is looked where all of them cost too much, or none does
OPENINGS, NEUTRAL, PAIRS = 16, 24, 32  # texts of each kind, at most
SAMPLING = Sampling(samples=1, new_tokens=32)


@dataclass(frozen=True)
class MultiplierChoice:
    """Why this multiplier: the best shift inside the window, or its end where no shift is known.

    largest: the largest multiplier inside. ended_by: what the next one breaks. pairs: how many
    held-out pairs the shift was measured on. points: each multiplier's figures, four digits of them.
    template: what `describe_template` says of the template that the pairs were rendered by.
    """

    multiplier: float
    largest: float
    ended_by: str
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
        if self.pairs:
            why = f"the largest shift on {self.pairs} held-out pairs within the bounds"
        else:
            why = "the largest within the bounds, whatever it shifts: there are no held-out pairs"
        return f"m = {self.multiplier:g} is {why}; the window ends at {self.largest:g} ({self.ended_by})"


def read_trial_texts(
    direction: str | None, held_out: str | None, chat_template: str = "auto"
) -> Texts:
    """Return the first of the texts that a bake's strength is chosen on.

    direction: as the user named it; one that ships has its own. held_out: a pairs file or set, None
    where there is none: then `pairs` is empty.
    """
    known = tried_on(direction)
    pairs = held_out or known.get("pairs")
    return Texts(
        tuple(read_pairs(pairs)[:PAIRS]) if pairs else (),
        tuple(read_prompts(known.get("neutral", "neutral"))[:NEUTRAL]),
        tuple(read_prompts("openings")[:OPENINGS]),
        chat_template=chat_template,
    )


def choose_multiplier(
    loaded: LanguageModel,
    site: str,
    push_at: Callable[[float], Push],
    texts: Texts,
    bounds: Bounds | None = None,
) -> MultiplierChoice:
    """Return the multiplier with the largest shift inside the window. push_at: m → push at `site`.

    Where the window ends beyond the multipliers that are tried first, further ones are. Raises BakeError
    where no strength stays within the bounds, and where none of those shifts the held-out pairs.
    """
    bounds = bounds or Bounds()
    given = loaded, site, push_at, texts
    points = list(_measure(*given, AUTO_MULTIPLIERS))
    while True:
        (window,) = find_windows(points, bounds)
        tried = sorted(point.arm.multiplier for point in points[1:])
        if window.largest == tried[-1] < LARGEST:
            further = [tried[-1] * step for step in (1.25, 1.5, 2.0)]
        elif window.largest is None and tried[0] > SMALLEST:
            further = [tried[0] * step for step in (0.25, 0.5, 0.75)]
        else:
            break
        points += _measure(*given, further)[1:]
    points = [points[0], *sorted(points[1:], key=lambda point: point.arm.multiplier)]
    if window.largest is None:
        raise BakeError(
            f"--multiplier auto: no strength stays within the bounds ({window.reason}); give one, "
            f"after bake sweep, as --multiplier M"
        )
    if window.best is None:
        shift = next(p.shift for p in points if p.arm.multiplier == window.largest)
        assert shift is not None
        raise BakeError(
            f"--multiplier auto: no significant shift of the {len(texts.pairs)} held-out pairs up to "
            f"m = {window.largest:g}, where the window ends (there {shift.value:+.3f} nats a token, 95 % "
            f"interval {shift.low:+.3f} to {shift.high:+.3f}); try another direction, or give "
            f"--multiplier M"
        )
    return MultiplierChoice(
        window.best,
        window.largest,
        window.reason,
        bounds,
        len(texts.pairs),
        tuple(_in_short(point) for point in points[1:]),
        describe_template(loaded.tokenizer, texts.pairs, texts.chat_template),
    )


def _measure(
    loaded: LanguageModel,
    site: str,
    push_at: Callable[[float], Push],
    texts: Texts,
    multipliers: Sequence[float],
) -> tuple[Point, ...]:
    """Return the base's point and those of the multipliers."""
    arms = [Arm(BASE, "base")]
    for multiplier in multipliers:
        push = push_at(multiplier)
        arms.append(
            Arm(
                f"m={multiplier:+g}",
                "direction",
                multiplier,
                site,
                push.law,
                push.band,
                push=push.vectors,
            )
        )
    measured = {
        "pairs": measure_pairs(loaded, arms, texts.pairs, chat_template=texts.chat_template),
        "neutral": measure_neutral(loaded, arms, texts.neutral),
        "rollouts": measure_rollouts(loaded, arms, texts.openings, SAMPLING),
    }
    return summarise(arms, measured, loaded.tokenizer, texts, SAMPLING)


def _in_short(point: Point) -> dict[str, float | None]:
    return {
        "multiplier": point.arm.multiplier,
        "shift": _figure(point.shift),
        "fluency_ratio": _figure(point.fluency_ratio),
        "neutral_kl_p95": _figure(point.neutral_kl.get("p95")),
    }


def _figure(interval: Interval | None) -> float | None:
    value = interval.to_dict()["value"] if interval else None
    return None if value is None else float(f"{value:.4g}")
