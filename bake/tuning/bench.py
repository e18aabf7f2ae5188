"""Candidates on one loaded model: what strength each needs to cost so much, and what it moves there.

All candidates of a round go through in one batch a text, so a round costs each of them a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.strength.coefficients import Push
from bake.sweeps.arms import Arm
from bake.sweeps.cost_curve import cost_of, cross, shorten
from bake.sweeps.design import BASE
from bake.sweeps.measurements import (
    Each,
    Sampling,
    Texts,
    measure_each,
    measure_neutral,
    measure_pairs,
)
from bake.sweeps.points import Point
from bake.sweeps.summary import summarise
from bake.tuning.candidates import Candidate

if TYPE_CHECKING:
    from bake.models.forward import LanguageModel

NEAR = 0.05  # of the cost is near enough
ROUNDS = 6
FIRST = 0.5  # the m of a usual band that is tried first
MOST_INFLUENCE = 2.0  # × the activation's length: nobody pushes further


@dataclass(frozen=True)
class Judged:
    """A candidate at its strength. kl: what it costs there; far from the target where none reaches it."""

    candidate: Candidate
    multiplier: float
    kl: float
    point: Point

    @property
    def moved(self) -> float:
        """The net shift of pairs, nats a token."""
        assert self.point.net_shift is not None
        return self.point.net_shift.value


class Bench:
    """Measures candidates. push_of: candidate → its push at m = 1. usual: how many layers a band has.

    forwards: texts run so far, a row of a batch each.
    """

    def __init__(
        self,
        loaded: LanguageModel,
        push_of: Callable[[Candidate], Push],
        *,
        target: float,
        usual: int,
        sign: int = 1,
        chat_template: str = "auto",
        each: Callable[[str], Each] = lambda _stage: measure_each,
    ) -> None:
        self.loaded, self.push_of = loaded, push_of
        self.target, self.usual, self.sign = target, usual, sign
        self.chat_template, self.each = chat_template, each
        self.forwards = 0
        self.rounds = self.brought = 0  # costs measured, and candidates brought to theirs
        self.sizes: dict[Candidate, float] = {}  # |m|, where each was found last

    def compare(self, stage: str, candidates: Sequence[Candidate], texts: Texts) -> list[Judged]:
        """Bring candidates to the cost on neutral texts; return them by what they move there, best first.

        stage: names the texts in a log.
        """
        costs = self._bring(stage, candidates, texts.neutral)
        arms = [self.arm(each, self.sizes[each]) for each in candidates]
        arms = [Arm(BASE, "base"), *arms]
        measured = measure_pairs(
            self.loaded,
            arms,
            texts.pairs,
            self.each(_name(f"{stage}: pairs", arms)),
            chat_template=self.chat_template,
        )
        self.forwards += 2 * len(arms) * len(texts.pairs)
        points = summarise(arms, {"pairs": measured}, self.loaded.tokenizer, texts, Sampling())
        found = [
            Judged(each, self.sign * self.sizes[each], costs[each], point)
            for each, point in zip(candidates, points[1:], strict=True)
        ]
        return sorted(found, key=lambda judged: -judged.moved)

    def _bring(
        self, stage: str, candidates: Sequence[Candidate], neutral: Sequence[str]
    ) -> dict[Candidate, float]:
        """Find every candidate's strength for the cost, all in lockstep; return what they cost at it."""
        tried: dict[Candidate, dict[float, float]] = {each: {} for each in candidates}
        sizes = {each: self.sizes.get(each, self._first(each)) for each in candidates}
        for _ in range(ROUNDS):
            open_ones = [each for each in candidates if sizes[each] not in tried[each]]
            if not open_ones:
                break
            for each, kl in self._cost(stage, open_ones, sizes, neutral).items():
                tried[each][sizes[each]] = kl
                if abs(kl / self.target - 1) > NEAR:
                    sizes[each] = self._next(each, tried[each])
        costs = {}
        self.brought += len(candidates)
        for each in candidates:
            known = tried[each]
            best = min(known, key=lambda size: abs(math.log(max(known[size], 1e-9) / self.target)))
            self.sizes[each], costs[each] = best, known[best]
        return costs

    def _first(self, candidate: Candidate) -> float:
        """Return what to try first: fewer layers take a stronger push of each for the same cost."""
        size = FIRST * self.usual / len(candidate.layers)
        return min(shorten(size), self._most(candidate))

    def _most(self, candidate: Candidate) -> float:
        influence = max(entry.relative_influence for entry in self.push_of(candidate).layers)
        return shorten(MOST_INFLUENCE / influence)

    def _next(self, candidate: Candidate, known: Mapping[float, float]) -> float:
        return min(shorten(cross(known, self.target)), self._most(candidate))

    def _cost(
        self,
        stage: str,
        candidates: Sequence[Candidate],
        sizes: Mapping[Candidate, float],
        neutral: Sequence[str],
    ) -> dict[Candidate, float]:
        """Return the 95th percentile of KL on neutral texts of each at its size."""
        arms = [Arm(BASE, "base"), *(self.arm(each, sizes[each]) for each in candidates)]
        measured = measure_neutral(
            self.loaded,
            arms,
            neutral,
            self.each(_name(f"{stage}: neutral", arms)),
            chat_template=self.chat_template,
        )
        self.forwards += len(arms) * len(neutral)
        self.rounds += len(candidates)
        return {
            each: cost_of(measured[arm.name]["kl"])
            for each, arm in zip(candidates, arms[1:], strict=True)
        }

    def arm(self, candidate: Candidate, size: float) -> Arm:
        """Return a candidate at |m| = size as an arm."""
        multiplier = self.sign * size
        push = self.push_of(candidate).at(multiplier)
        name = f"{candidate.name} m={multiplier:+g}"
        site, law, band = candidate.site, candidate.law, push.band
        return Arm(name, "direction", multiplier, site, law, band, push=push.vectors)


def _name(stage: str, arms: Sequence[Arm]) -> str:
    """Return what a log calls measurements of just these arms."""
    named = "\n".join(arm.name for arm in arms)
    return f"{stage} {hashlib.sha256(named.encode()).hexdigest()[:16]}"
