"""A finished sweep, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy.base import AnyBase
from bake.directions.direction import Direction
from bake.directions.direction_file import hash_vectors
from bake.support.html import show
from bake.sweeps.findings import DoseResponse
from bake.sweeps.measurements import Texts
from bake.sweeps.points import ROW, row_of

if TYPE_CHECKING:
    import torch

    from bake.sweeps.attribution import Attribution


@dataclass(frozen=True)
class Names:
    """What a page calls the direction, the pairs that judge it and the command; no paths."""

    direction: str = "a direction"
    pairs: str = "pairs"
    command: str = "bake sweep"


@dataclass(frozen=True)
class Trial:
    """A finished sweep: what it found and where it was written.

    names: what the page calls things.
    template: what `describe_template` says of the template that the pairs were rendered by.
    """

    output: Path
    base: AnyBase
    direction: Direction
    found: DoseResponse
    texts: Texts
    template: Mapping[str, str] = field(default_factory=dict)
    attribution: Attribution | None = None
    names: Names = field(default_factory=Names)
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def __repr__(self) -> str:
        return f"<Trial: {self.summary}; {self.output}>"

    def _repr_html_(self) -> str:
        rows = [row_of(point) for point in self.found.curve()]
        notes = [window.describe() for window in self.found.windows]
        return show(f"Sweep: {self.summary}", ROW, rows, notes)

    @property
    def summary(self) -> str:
        """The sweep in a few words: the model, what was tried, and the window."""
        curve = self.found.curve()
        tried = ", ".join(f"{p.arm.multiplier:+g}" for p in curve if p.arm.multiplier)
        best = [f"{w.best:+g}" for w in self.found.windows if w.best is not None]
        return (
            f"{self.base.to_dict()['id']} at m = {tried}; best within the bounds: "
            f"{', '.join(best) or 'none'}"
        )

    def report(self) -> dict[str, Any]:
        """Return what `report.json` holds: no times and no paths."""
        values: dict[str, Any] = {
            "complete": True,
            "base": self.base.to_dict(),
            "direction": {**self.direction.to_dict(), "sha256": hash_vectors(self._vectors())},
            "texts": {
                "pairs": len(self.texts.pairs),
                "neutral": len(self.texts.neutral),
                "openings": len(self.texts.openings),
                **self.template,
            },
            **self.found.to_dict(),
        }
        if self.attribution is not None:
            values["by_layer"] = self.attribution.to_dict()
        return values

    def _vectors(self) -> dict[int, torch.Tensor]:
        """Return the unit vectors that were pushed."""
        return {layer: self.direction.layer(layer) for layer in self.found.coefficients}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output),
            **self.report(),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }
