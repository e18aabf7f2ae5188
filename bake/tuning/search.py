"""The search, coarse to fine: ways of finding a direction, then places, then laws, then a fair judgement.

Each stage is one or two rounds of successive halving (Jamieson & Talwalkar 2016): all candidates on a few
texts, the better ones on more. What was chosen is then ranked on pairs and texts that chose nothing, beside
what `bake export` does by default, because the best of many looks better than it is where it was chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bake.errors import BakeError, DirectionError
from bake.support.processes import agree
from bake.support.progress import announce
from bake.sweeps.measurements import Texts
from bake.tuning.bench import Bench, Judged
from bake.tuning.candidates import Candidate, Space

COARSE = (4, 6)  # neutral texts, pairs, of the first round; the second has them all
KEPT = 3  # of the first round are at least in the second
FINALISTS = 4
WAYS = 2  # whose bands are compared


@dataclass(frozen=True)
class Ranking:
    """What a search found.

    finalists: on the texts that chose nothing, best first; `default` is among them if it can be pushed.
    layers: every layer by itself, on the texts that chose, in order. forwards: texts that were run; grid:
    as many as every candidate on all texts would have been. finished: whether no stage was left out for
    want of time.
    """

    finalists: tuple[Judged, ...]
    layers: tuple[Judged, ...]
    default: Candidate
    candidates: int
    forwards: int
    grid: int
    finished: bool


@dataclass
class Search:
    """One search. choosing, judging: the texts of either; no pair and no neutral text is in both."""

    bench: Bench
    space: Space
    default: Candidate
    choosing: Texts
    judging: Texts
    minutes: float | None = None
    _begun: float = field(default_factory=time.monotonic)
    _seen: dict[Candidate, Judged] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)
    _finished: bool = True

    def run(self) -> Ranking:
        """Search; rank the best."""
        ways = self._halve("ways", self.space.ways())
        if not ways:
            raise DirectionError("no way of finding the direction gives one in the band 40:90")
        layers: list[Judged] = []
        if self._has_time("places"):
            singles = self.space.single_layers(ways[0].candidate)
            layers = self._measure("layers", singles, self.choosing)
            bands = [band for way in ways[:WAYS] for band in self.space.bands(way.candidate)]
            self._halve("bands", bands)
        if self._has_time("laws"):
            laws = [
                law for judged in self._best(KEPT) for law in self.space.by_law(judged.candidate)
            ]
            self._measure("laws", laws, self.choosing)
        best = [judged.candidate for judged in self._best(FINALISTS)]
        finalists = self.bench.compare(
            "judging", self._pushable(list(dict.fromkeys([*best, self.default]))), self.judging
        )
        return Ranking(
            tuple(finalists),
            tuple(sorted(layers, key=lambda judged: judged.candidate.layers)),
            self.default,
            self.space.size(),
            self.bench.forwards,
            self._grid(),
            self._finished,
        )

    def _halve(self, stage: str, candidates: Sequence[Candidate]) -> list[Judged]:
        """Measure candidates on a few texts, the better third of them on all; return those."""
        candidates = self._pushable(candidates)
        kept = max(KEPT, len(candidates) // 3)
        if len(candidates) > kept:
            neutral, pairs = COARSE
            few = replace(
                self.choosing,
                neutral=self.choosing.neutral[:neutral],
                pairs=self.choosing.pairs[:pairs],
            )
            coarse = self.bench.compare(f"{stage}, coarse", candidates, few)
            candidates = [judged.candidate for judged in coarse[:kept]]
        return self._measure(stage, candidates, self.choosing)

    def _measure(self, stage: str, candidates: Sequence[Candidate], texts: Texts) -> list[Judged]:
        candidates = self._pushable(candidates)
        if not candidates:
            return []
        found = self.bench.compare(stage, candidates, texts)
        self._seen.update({judged.candidate: judged for judged in found})
        best = found[0]
        announce(f"{stage}: {best.candidate.name} moves most, {best.moved:+.3f} nats a token")
        return found

    def _pushable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Leave out candidates without a push, as where texts do not differ in a layer; say why, once."""
        found = []
        for candidate in candidates:
            try:
                self.bench.push_of(candidate)
                found.append(candidate)
            except BakeError as error:
                if str(error) not in self._told:
                    announce(f"left out: {candidate.name}: {error}")
                self._told.add(str(error))
        return found

    def _best(self, count: int) -> list[Judged]:
        return sorted(self._seen.values(), key=lambda judged: -judged.moved)[:count]

    def _has_time(self, stage: str) -> bool:
        """Tell whether another stage may begin; say what is left out where none may."""
        if not self._finished:
            return False
        spent = agree(time.monotonic() - self._begun)
        if self.minutes is not None and spent > 60 * self.minutes:
            announce(
                f"--minutes {self.minutes:g} are over before {stage} were compared; the same command "
                "goes on from here"
            )
            self._finished = False
        return self._finished

    def _grid(self) -> int:
        """Return what every candidate on all texts that choose would take, at as many rounds each."""
        rounds = self.bench.rounds / max(self.bench.brought, 1)
        texts = self.choosing
        each = rounds * len(texts.neutral) + 2 * len(texts.pairs)
        return round(self.space.size() * each)
