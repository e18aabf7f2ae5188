"""How strong a found push is: relative influence, and the law and multiplier that explain its lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.directions.logit_lens import LayerTokens
from bake.strength.coefficients import DEFAULT_LAW, LAWS
from bake.support.text import one_line

FITS_LAW = 0.1  # of the lengths, within which a law explains them: norms depend on the prompts


@dataclass(frozen=True)
class Strength:
    """How strong a push is. norms: {layer: μ}. influences: {layer: ‖push‖ / μ}.

    laws: {law: (m that fits best, how far the lengths are from it, as a share)}, the nearest first; laws
    that differ by a factor only fit alike, and then the default one comes first. tokens: what it raises and
    lowers in its last layer; None where no unembedding reads it.
    """

    norms: Mapping[int, float]
    influences: Mapping[int, float]
    laws: Mapping[str, tuple[float, float]]
    tokens: LayerTokens | None = None

    @property
    def law(self) -> str | None:
        """The law that explains the lengths; None where none does."""
        name, (_, misfit) = next(iter(self.laws.items()))
        return name if misfit < FITS_LAW else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        tokens = self.tokens
        return {
            "norms": {str(layer): value for layer, value in self.norms.items()},
            "relative_influence": {str(layer): value for layer, value in self.influences.items()},
            "law": self.law,
            "multiplier": self.laws[self.law][0] if self.law else None,
            "laws": {
                name: {"multiplier": m, "misfit": misfit} for name, (m, misfit) in self.laws.items()
            },
            "raised": [each.token for each in tokens.raised] if tokens else None,
            "lowered": [each.token for each in tokens.lowered] if tokens else None,
        }

    def describe(self) -> str:
        """Return it in sentences."""
        values = self.influences.values()
        said = f"relative influence {min(values):.3g} to {max(values):.3g}"
        if self.law is None:
            name, (_, misfit) = next(iter(self.laws.items()))
            said += f"; no law fits its lengths ({name}, the nearest, is off by {misfit:.0%})"
        else:
            m, misfit = self.laws[self.law]
            said += f"; law {self.law} with m = {m:.3g} fits its lengths within {misfit:.1%}"
        if self.tokens is not None:
            raised, lowered = (
                ", ".join(repr(one_line(each.token, 24)) for each in scores)
                for scores in (self.tokens.raised, self.tokens.lowered)
            )
            said += f"\nraises {raised}\nlowers {lowered}"
        return said


def fit_laws(
    lengths: Mapping[int, float], norms: Mapping[int, float], hidden_size: int
) -> dict[str, tuple[float, float]]:
    """Return {law: (m, misfit)} by least squares of lengths over α at m = 1, the nearest law first.

    lengths, norms: {layer: …} of the same layers. misfit: ‖lengths − m·α‖ / ‖lengths‖.
    """
    found: dict[str, tuple[float, float]] = {}
    size = sum(length**2 for length in lengths.values()) ** 0.5
    for name, law in LAWS.items():
        unit = law(norms, hidden_size)
        m = sum(lengths[layer] * unit[layer] for layer in unit) / sum(a * a for a in unit.values())
        off = sum((lengths[layer] - m * unit[layer]) ** 2 for layer in unit) ** 0.5
        found[name] = m, off / size
    # To a hundredth of a per cent: laws that are multiples of each other differ by rounding.
    order = sorted(found, key=lambda name: (round(found[name][1], 4), name != DEFAULT_LAW))
    return {name: found[name] for name in order}
