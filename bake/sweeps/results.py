"""A finished sweep, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy.base import Base
from bake.directions.direction import Direction
from bake.directions.direction_file import hash_vectors
from bake.sweeps.findings import DoseResponse
from bake.sweeps.measurements import Texts

if TYPE_CHECKING:
    import torch

    from bake.sweeps.attribution import Attribution


@dataclass(frozen=True)
class Trial:
    """A finished sweep: what it found and where it was written.

    template: what `describe_template` says of the template that the pairs were rendered by.
    """

    output: Path
    base: Base
    direction: Direction
    found: DoseResponse
    texts: Texts
    template: Mapping[str, str] = field(default_factory=dict)
    attribution: Attribution | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0

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
