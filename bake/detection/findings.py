"""What was found in a checkpoint, as values and as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bake.detection.steps import Step
from bake.detection.strength import Strength
from bake.directions.direction import Direction
from bake.support.tables import format_table
from bake.support.text import list_numbers

if TYPE_CHECKING:
    import torch

LAYERS = "layers"  # the kind of a push by layers that only add a constant
VERDICTS = ("none", "push", "ablation", "both", "other")
_VERDICT_WORDS = {
    "none": "nothing was found",
    "push": "a push was baked in",
    "ablation": "something was taken out",
    "both": "something was taken out, and a push was baked in",
    "other": "it differs in ways that are neither a push nor an ablation",
}


@dataclass(frozen=True)
class PushFound:
    """A push that was read out of biases.

    vectors: {layer: (hidden_size,) float64, what is added at the site}. residuals: {layer: how far the
    biases are from any push, as a share of what was added}; 0 where every vector would do. loaded: whether
    transformers loads these biases at all. strength: where the model was run. step: where the biases were
    trained, and only a step and its return speak for a push; vectors then are along that step.
    """

    site: str
    kind: str
    vectors: Mapping[int, torch.Tensor] = field(repr=False)
    residuals: Mapping[int, float]
    parameters: tuple[str, ...]
    loaded: bool = True
    strength: Strength | None = None
    step: Step | None = None

    @property
    def lengths(self) -> dict[int, float]:
        """{layer: ‖push‖}."""
        return {layer: float(vector.norm()) for layer, vector in self.vectors.items()}

    @property
    def coherence(self) -> float:
        """The mean cosine of neighbouring layers' vectors; 1 of one layer."""
        import torch

        cosines = [
            float(torch.cosine_similarity(self.vectors[a], self.vectors[b], dim=0))
            for a, b in pairwise(sorted(self.vectors))
        ]
        return sum(cosines) / len(cosines) if cosines else 1.0

    @property
    def fits(self) -> bool:
        """Whether the biases are those of a push, to the rounding of their dtype."""
        return max(self.residuals.values()) < MOST_RESIDUAL

    def table(self) -> str:
        """Return a row a layer."""
        measured = () if self.strength is None else ("relative influence",)
        rows = [
            (
                str(layer),
                f"{self.lengths[layer]:.4g}",
                f"{self.residuals[layer]:.1e}",
                *(() if self.strength is None else (f"{self.strength.influences[layer]:.4g}",)),
            )
            for layer in sorted(self.vectors)
        ]
        return format_table((f"{self.site}, layer", "length", "residual", *measured), rows)

    def direction(self) -> Direction:
        """Return it as unit vectors that know their lengths."""
        units: dict[int | None, Any] = {
            layer: (vector / vector.norm()).float() for layer, vector in self.vectors.items()
        }
        lengths: dict[int | None, float] = dict(self.lengths.items())
        return Direction(units, self.site, {"method": "detected"}, lengths=lengths)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "site": self.site,
            "kind": self.kind,
            "layers": sorted(self.vectors),
            "lengths": {str(layer): length for layer, length in self.lengths.items()},
            "residuals": {str(layer): value for layer, value in self.residuals.items()},
            "coherence": self.coherence,
            "loaded": self.loaded,
            "parameters": list(self.parameters),
            "strength": None if self.strength is None else self.strength.to_dict(),
            "step": None if self.step is None else self.step.to_dict(),
        }

    def describe(self) -> str:
        """Return the push in a sentence."""
        lengths = self.lengths.values()
        never = "" if self.loaded else ", in tensors that are present but never loaded"
        if self.step is not None:
            return self.step.describe(self.site)
        return (
            f"a push at {self.site} in layers {list_numbers(sorted(self.vectors))} (length "
            f"{min(lengths):.3g} to {max(lengths):.3g}, neighbouring layers' cosine "
            f"{self.coherence:.3f}){never}"
        )


@dataclass(frozen=True)
class AblationFound:
    """Matrices that lost a subspace. basis: (directions, hidden_size) float64, orthonormal.

    strengths: {tensor: the share of its part that is gone}. residual: the largest share of a matrix's
    change that this does not explain. scope: "stream", "writes", or "parts" with columns: {tensor: columns
    that are zero}, of heads and neurons; then there is no basis. layers: whose writes changed.
    """

    scope: str
    layers: tuple[int, ...]
    basis: torch.Tensor | None = field(default=None, repr=False)
    strengths: Mapping[str, float] = field(default_factory=dict)
    residual: float = 0.0
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def strength(self) -> float:
        """The mean share that is gone."""
        return sum(self.strengths.values()) / len(self.strengths) if self.strengths else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "scope": self.scope,
            "layers": list(self.layers),
            "rank": 0 if self.basis is None else len(self.basis),
            "strength": self.strength,
            "residual": self.residual,
            "tensors": sorted([*self.strengths, *self.columns]),
            "columns": {name: list(columns) for name, columns in self.columns.items()},
        }

    def describe(self) -> str:
        """Return the ablation in a sentence."""
        if self.columns:
            count = sum(map(len, self.columns.values()))
            return f"{count} columns of {len(self.columns)} output projections are zero"
        assert self.basis is not None
        what = "one direction" if len(self.basis) == 1 else f"{len(self.basis)} directions"
        where = ("the residual stream" if self.scope == "stream" else "writes of layers ") + (
            "" if self.scope == "stream" else list_numbers(self.layers)
        )
        known = f", {self.strength:.3g} × of it" if self.strengths else ""
        return f"{what} taken out of {where}{known}"


MOST_RESIDUAL = 0.2


@dataclass(frozen=True)
class Detection:
    """What `bake detect` found.

    base: None where none was given. others: differences that are neither push nor ablation. notes: what
    somebody should know, such as what cannot be seen. lies: what bake.json says and the weights do not.
    whose: {direction's name: {layer: cosine}}; shares: {name: its coefficient in a sum of all, mean over
    layers, as a share of the push's length}. explained: the suspect's tensors that pushes and ablations
    account for. rewritten_as: what the base was compared as, where that is another architecture. undone:
    where the suspect was written without them. read_bytes: of both checkpoints, of size_bytes in all.
    """

    suspect: str
    base: str | None
    pushes: tuple[PushFound, ...] = ()
    ablations: tuple[AblationFound, ...] = ()
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lies: tuple[str, ...] = ()
    whose: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    explained: tuple[str, ...] = ()
    rewritten_as: str | None = None
    undone: str | None = None
    read_bytes: int = 0
    size_bytes: int = 0

    @property
    def verdict(self) -> str:
        """One of `none`, `push`, `ablation`, `both`, `other`."""
        if self.pushes and self.ablations:
            return "both"
        if self.pushes or self.ablations:
            return "push" if self.pushes else "ablation"
        return "other" if self.others else "none"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "suspect": self.suspect,
            "base": self.base,
            "verdict": self.verdict,
            "pushes": [each.to_dict() for each in self.pushes],
            "ablations": [each.to_dict() for each in self.ablations],
            "others": list(self.others),
            "notes": list(self.notes),
            "lies": list(self.lies),
            "whose": {
                name: {str(layer): value for layer, value in row.items()}
                for name, row in self.whose.items()
            },
            "shares": dict(self.shares),
            "tensors": list(self.explained),
            "undone": self.undone,
            "read_bytes": self.read_bytes,
            "size_bytes": self.size_bytes,
        }

    def describe(self) -> str:
        """Return what a person reads."""
        beside = f" beside {self.base}" if self.base else ", without a base"
        lines = [f"{self.suspect}{beside}: {_VERDICT_WORDS[self.verdict]}"]
        lines += [ablation.describe() for ablation in self.ablations]
        lines += [push.describe() for push in self.pushes]
        for push in self.pushes:
            lines += ["", push.table()]
            if push.strength is not None:
                lines.append(push.strength.describe())
        for name, row in self.whose.items():
            best = max(row, key=lambda layer: abs(row[layer]))
            share = f", {self.shares[name]:+.3g} × the push's length" if name in self.shares else ""
            lines.append(f"{name}: cosine {row[best]:+.4f} in layer {best}{share}")
        lines += [f"differs: {each}" for each in self.others]
        lines += [f"bake.json lies: {each}" for each in self.lies]
        lines += [f"note: {each}" for each in self.notes]
        if self.undone is not None:
            lines.append(f"written to {self.undone} without it; nothing is found there any more")
        part = self.read_bytes / self.size_bytes if self.size_bytes else 0.0
        lines.append(f"{self.read_bytes / 1e6:.3g} MB read, {part:.2%} of the weights")
        return "\n".join(lines)
