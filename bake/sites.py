"""What a site is: where an activation is captured, where a push is added, what a slot receives.

Direction, norms, hooks and plan all ask this module and nothing else, so that a site can never mean
two things. It knows names of modules inside a decoder layer (`LayerStructure`), not architectures:
`bake.anatomy` finds those names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bake.errors import DirectionError, UnsupportedError

if TYPE_CHECKING:
    import torch

Side = Literal["input", "output"]
RESIDUAL_SITES = ("mlp_out", "attn_out")
INPUT_SITES = ("attn_in", "mlp_in")
SITES = RESIDUAL_SITES + INPUT_SITES

UNREACHED = (
    1e-6  # of a push, that a solved slot may leave out; float64 solves to 1e-10 where it can
)

DESCRIPTIONS = {
    "mlp_out": "the residual stream after the MLP's add (the decoder layer's output)",
    "attn_out": "the residual stream after attention's add",
    "attn_in": "attention's normalised input",
    "mlp_in": "the MLP's normalised input",
}


@dataclass(frozen=True)
class Location:
    """One side of a module. `module` is a path inside the decoder layer; "" is the layer itself."""

    module: str
    side: Side


@dataclass(frozen=True)
class LayerStructure:
    """Where a model keeps its decoder layers, and what the parts of a layer are called.

    `attention` is whatever mixes positions (a recurrent block counts). `before_mlp` is the module,
    nearly always a norm, whose input is the residual stream after attention's add; None in a parallel
    block, which has no such point. `attention_scale` is how far the residual stream moves when
    attention's output moves by one (a residual multiplier; 1 nearly everywhere). `input_norms` names,
    for each input site, the norm whose output is the site's activation, where one is.
    `attention_input` is the module that takes attention's normalised input where that is not
    `attention` itself, as where the block holds its own norm and residual add. `others` has the
    layers whose parts are called otherwise, by index: hybrids mix two or three kinds of layers.
    """

    layers: str
    attention: str | None
    mlp: str | None
    before_mlp: str | None
    attention_scale: float = 1.0
    input_norms: Mapping[str, str] = field(default_factory=dict)
    attention_input: str | None = None
    others: Mapping[int, LayerStructure] = field(default_factory=dict)

    def layer(self, index: int) -> str:
        """Return the module path of decoder layer `index` (0-based)."""
        return f"{self.layers}.{index}"

    def at(self, index: int) -> LayerStructure:
        """Return the structure of decoder layer `index` (0-based)."""
        return self.others.get(index, self)


@dataclass(frozen=True)
class Slot:
    """A parameter that absorbs a constant at a site exactly.

    `weight` names the matrix that stands between the site and the bias: the bias receives W·v; where
    it is a vector, which multiplies the bias channel by channel, the bias receives v / W. With
    `weight` None the bias receives v / scale. `transposed` marks matrices stored as (in, out), as
    GPT-2's Conv1D does. `inert` is the part of the bias, as fractions of its length, that no output
    depends on: a key bias without rotary positions cancels in the softmax. `axis` is for slots that
    are matrices: v lies along that axis, in each of the rows or columns `span` [start, stop) of the
    other one (None: in all of them, as experts' biases do). `part` is for a parameter that is merged on
    loading of several tensors on disk, experts: the slot is this one of them. `solved` is for a bias that
    stands before the matrix instead of behind it: it receives the x of W·x = v / scale, as a value bias
    does, which every attended position has alike, so that the softmax's weights, of sum one, leave it be.
    """

    bias: str
    weight: str | None = None
    transposed: bool = False
    scale: float = 1.0
    inert: tuple[float, float] | None = None
    axis: int | None = None
    span: tuple[int, int] | None = None
    part: int | None = None
    solved: bool = False

    @property
    def key(self) -> str:
        """What names the slot: the parameter, and which part of it."""
        return self.bias if self.part is None else f"{self.bias}[{self.part}]"

    def delta(
        self,
        push: torch.Tensor,
        weight: torch.Tensor | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Return what the parameter receives, in float64 and its shape.

        push: (hidden_size,). weight: (out, hidden_size), or (hidden_size, out) when transposed;
        (experts, …) where each expert has its own.
        shape: the parameter's, needed where the slot is a matrix.
        """
        vector = push.double()
        if self.axis is not None and shape is not None:
            return self._spread(vector / self.scale, self.axis, shape)
        if self.weight is None:
            return vector / self.scale
        if weight is None:
            raise UnsupportedError(f"slot {self.bias} needs the matrix {self.weight} to fold W·v")
        matrix = weight.double()
        if self.solved:
            return self._solve(vector / self.scale, matrix.T if self.transposed else matrix)
        if matrix.ndim == 1:
            return vector / matrix
        return vector @ matrix if self.transposed else matrix @ vector

    def _solve(self, vector: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Return the smallest x of matrix · x = vector; raise UnsupportedError where there is none."""
        import torch

        solved = torch.linalg.lstsq(matrix, vector[:, None], driver="gelsd").solution
        found: torch.Tensor = solved[:, 0]
        off = float((matrix @ found - vector).norm() / vector.norm().clamp(min=1e-300))
        if not off <= UNREACHED:
            raise UnsupportedError(
                f"{self.bias} reaches only a part of the push: {off:.1%} of it is outside of what "
                f"{self.weight} writes; another site has no such limit"
            )
        return found

    def _spread(self, vector: torch.Tensor, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Lay the vector along `axis` of a zero matrix, in the rows or columns of the span."""
        start, stop = self.span or (0, shape[1 - axis])
        found = vector.new_zeros(shape)
        if axis == 1:
            found[start:stop] = vector
        else:
            found[:, start:stop] = vector[:, None]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        return {"bias": self.bias, "weight": self.weight, "scale": self.scale}


def check_site(site: str) -> str:
    """Return `site` if it is one of the four; raise UnsupportedError naming them otherwise."""
    if site not in SITES:
        raise UnsupportedError(f"unknown site {site!r}; the sites are {', '.join(SITES)}")
    return site


def capture_location(site: str, structure: LayerStructure) -> Location:
    """Return where the site's activation is read: for directions and for norms."""
    if site == "mlp_out":
        return Location("", "output")
    if site == "attn_out" and structure.before_mlp is not None:
        return Location(structure.before_mlp, "input")
    if site == "attn_in" and structure.attention is not None:
        return Location(structure.attention_input or structure.attention, "input")
    if site == "mlp_in" and structure.mlp is not None:
        return Location(structure.mlp, "input")
    raise UnsupportedError(f"this architecture's decoder layer has no {check_site(site)} site")


def addition_location(site: str, structure: LayerStructure) -> tuple[Location, float]:
    """Return where a hook adds the push, and the factor that it multiplies the push with.

    Only `attn_out` is added elsewhere than it is captured: the residual stream after attention's add
    is no module's output, but attention's output is added to it, times the residual multiplier.
    """
    if site == "attn_out" and structure.attention is not None:
        return Location(structure.attention, "output"), 1.0 / structure.attention_scale
    return capture_location(site, structure), 1.0


def layers_with(site: str, structure: LayerStructure, layers: Iterable[int]) -> list[int]:
    """Return those of `layers` that have the site at all; hybrids may lack it in some."""
    check_site(site)
    found = []
    for layer in layers:
        try:
            capture_location(site, structure.at(layer))
        except UnsupportedError:
            continue
        found.append(layer)
    return found


def check_direction_site(found_at: str, site: str, *, convert: bool) -> str | None:
    """Say whether a direction found at one site may be used at another.

    Returns a sentence to announce, or None where there is nothing to say. Raises DirectionError for a
    residual direction at an input site (and the reverse) unless `convert` is set, because a
    normalised input is another space: û there is normalise(norm weight ⊙ û).
    """
    if found_at == site:
        return None
    if found_at in RESIDUAL_SITES and site in RESIDUAL_SITES:
        return f"the direction was found at {found_at}; {site} is the same residual stream"
    if found_at in RESIDUAL_SITES and site in INPUT_SITES:
        if convert:
            return f"the direction was found at {found_at}; it is converted to {site} by the norm's weight"
        raise DirectionError(
            f"the direction was found at {found_at} and {site} is a normalised input, another space; "
            f"find it there (bake direction --site {site}) or pass --convert-site"
        )
    raise DirectionError(
        f"the direction was found at {found_at} and cannot be used at {site}; "
        f"find it there (bake direction --site {site})"
    )


def is_usable_at(found_at: str, site: str) -> bool:
    """Tell whether a direction found at `found_at` can be used at `site` as it is."""
    return found_at == site or (found_at in RESIDUAL_SITES and site in RESIDUAL_SITES)
