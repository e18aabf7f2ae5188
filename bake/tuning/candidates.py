"""What is compared: ways of finding a direction, places to push along it, and laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bake.strength.coefficients import DEFAULT_BAND, DEFAULT_LAW, band_layers
from bake.support.text import list_numbers

GIVEN = "given"  # the method of a direction that came from a file
# Where bands begin and end, in per cent of the depth: every band between two of them is a candidate.
EDGES = (10, 25, 40, 55, 70, 90)


@dataclass(frozen=True)
class Candidate:
    """One way of pushing, whatever its strength.

    method, token: how the direction is found; ("given", "") for one from a file. layers: 0-based; with
    gaps where a hybrid has layers that take no push.
    """

    site: str
    method: str
    token: str
    layers: tuple[int, ...]
    law: str = DEFAULT_LAW

    @property
    def name(self) -> str:
        """What it is called in reports."""
        where = f"layer{'s' if len(self.layers) > 1 else ''} {list_numbers(self.layers)}"
        how = f"{self.method}/{self.token}" if self.token else self.method
        return f"{self.site}, {how}, {where}, {self.law}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "layers": list(self.layers), "name": self.name}


@dataclass(frozen=True)
class Space:
    """All that is compared. pushable: {site: the layers that can be pushed there}."""

    pushable: Mapping[str, Sequence[int]]
    methods: tuple[str, ...]
    tokens: tuple[str, ...]
    laws: tuple[str, ...]
    layer_count: int

    def ways(self) -> list[Candidate]:
        """Return every site with every way of finding its direction, on the default band."""
        return [
            Candidate(site, method, token, self._within(site, DEFAULT_BAND))
            for site in self.pushable
            for method in self.methods
            for token in self.tokens
            if self._within(site, DEFAULT_BAND)
        ]

    def bands(self, way: Candidate) -> list[Candidate]:
        """Return a way on every band."""
        shares = [(a / 100, b / 100) for a in EDGES for b in EDGES if a < b]
        held = [self._within(way.site, share) for share in shares]
        return [_on(way, layers) for layers in dict.fromkeys(held) if len(layers) > 1]

    def single_layers(self, way: Candidate) -> list[Candidate]:
        """Return a way in every layer by itself."""
        return [_on(way, (layer,)) for layer in self.pushable[way.site]]

    def by_law(self, place: Candidate) -> list[Candidate]:
        """Return a place by every other law, which make a difference in several layers only."""
        if len(place.layers) == 1:
            return []
        return [
            Candidate(place.site, place.method, place.token, place.layers, law)
            for law in self.laws
            if law != place.law
        ]

    def size(self) -> int:
        """Return how many candidates there are in all."""
        return sum(
            len(self.single_layers(way)) + len(self.laws) * len(self.bands(way))
            for way in self.ways()
        )

    def _within(self, site: str, share: tuple[float, float]) -> tuple[int, ...]:
        """Return the layers of a band that can be pushed, () where there are none."""
        first, stop = (int(edge * self.layer_count + 1e-9) for edge in share)
        if first >= stop:
            return ()
        band = band_layers(self.layer_count, share)
        return tuple(layer for layer in band if layer in self.pushable[site])


def _on(way: Candidate, layers: tuple[int, ...]) -> Candidate:
    return Candidate(way.site, way.method, way.token, layers, way.law)
