"""What writes to the residual stream, what reads it, and what taking a subspace out of it means.

An ablation is defined here once: hooks, the edits of a checkpoint and the proof ask this module. Which
parameters write is discovered by `bake.anatomy.writes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bake.errors import DirectionError, UnsupportedError
from bake.support.text import list_numbers

if TYPE_CHECKING:
    import torch

# stream: nothing of the subspace is left in the residual stream, at any point. writes: the attention's and
# MLP's writes of some layers lose a share of their part in it.
SCOPES = ("stream", "writes")
# Of a vector's length, below which nothing of it is left after those before it: it is one of their sums.
_DEPENDENT = 1e-4
_CHUNK = 1 << 24  # numbers of a matrix that are in float64 at a time


@dataclass(frozen=True)
class Write:
    """A parameter of which every slice along `axis` is added to the residual stream, times something.

    axis: counted from the last, because experts that are stored one by one lack the first.
    """

    parameter: str
    axis: int


@dataclass(frozen=True)
class LayerWrites:
    """One decoder layer: paths of modules inside it, and its parameters by their whole names.

    readers: what the residual stream goes into, the layer itself apart. blocks: whose outputs are added
    to it. writes: what these outputs are made of.
    """

    readers: tuple[str, ...]
    blocks: tuple[str, ...]
    writes: tuple[Write, ...]


@dataclass(frozen=True)
class Untying:
    """An output head that shares the embedding's matrix, and the config keys that give it its own."""

    head: str
    embedding: str
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class WriteMap:
    """Everything that writes to a model's residual stream.

    layers: the path of the list of decoder layers. untying: None where the head has its own weights.
    """

    layers: str
    embeddings: tuple[Write, ...]
    by_layer: Mapping[int, LayerWrites]
    untying: Untying | None = None

    @property
    def every(self) -> tuple[Write, ...]:
        """Everything that writes, the embeddings first."""
        return (*self.embeddings, *(w for parts in self.by_layer.values() for w in parts.writes))

    def of(self, ablation: Removal) -> tuple[tuple[Write, int | None], ...]:
        """Return the parameters that an ablation changes, each with its layer, None for embeddings."""
        if isinstance(ablation, Silence):
            return tuple(dict.fromkeys((part.write, part.layer) for part in ablation.parts))
        found: list[tuple[Write, int | None]] = []
        if ablation.scope == "stream":
            found += [(write, None) for write in self.embeddings]
        for layer in ablation.layers:
            found += [(write, layer) for write in self.by_layer[layer].writes]
        return tuple(found)


@dataclass(frozen=True)
class Ablation:
    """What is taken out: x ← x − s · Σ (x·b) b over an orthonormal basis b.

    basis: {decoder layer: (directions, hidden_size) float64, orthonormal}; for `stream` one for all layers.
    scope: one of SCOPES. strength: s; 1 takes out all, 2 reflects, a negative one amplifies.
    Source: Arditi et al., "Refusal in language models is mediated by a single direction", arXiv 2406.11717.
    """

    basis: Mapping[int, torch.Tensor] = field(repr=False)
    scope: str = "stream"
    strength: float = 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers whose writes it changes."""
        return tuple(sorted(self.basis))

    @property
    def rank(self) -> int:
        """How many directions are taken out."""
        return max(len(basis) for basis in self.basis.values())

    def basis_at(self, layer: int | None) -> torch.Tensor:
        """Return the basis of a layer; None is the embedding, which has the stream's."""
        return self.basis[self.layers[0] if layer is None else layer]

    def edit(
        self, weight: torch.Tensor, write: Write, layer: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a parameter of a layer (None: an embedding) without the subspace, in a dtype."""
        return edit_weight(weight, self.basis_at(layer), self.strength, write.axis, dtype)

    def describe(self, edited: int) -> str:
        """Return what is taken out of what, in a sentence. edited: how many tensors change."""
        what = "one direction" if self.rank == 1 else f"{self.rank} directions"
        if self.scope == "stream":
            return f"{what} taken out of the residual stream: {edited} tensors edited"
        return (
            f"{what} taken out of what layers {list_numbers(self.layers)} write, strength "
            f"{self.strength:g}: {edited} tensors edited"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`; the basis is in `direction.safetensors`."""
        return {
            "scope": self.scope,
            "strength": self.strength,
            "rank": self.rank,
            "layers": list(self.layers),
        }


@dataclass(frozen=True)
class Part:
    """Columns of a matrix that writes: what a head or a neuron of one layer goes through.

    columns: [start, stop) along the matrix's input axis. name: as the user wrote it, "10.5" or "10:3072".
    """

    name: str
    layer: int
    write: Write
    columns: tuple[int, int]

    @property
    def input_axis(self) -> int:
        """The axis along which the matrix reads, counted from the last."""
        return -1 if self.write.axis == -2 else -2


@dataclass(frozen=True)
class Silence:
    """Heads and neurons that write nothing, or their mean whatever they read.

    Their columns of the output projections are zero; means: {part's name: (columns,) float64, the mean of
    what goes through them}, whose product with these columns a bias then adds. heads, neurons: "layer.head"
    and "layer:neuron", as they were named.
    Source: Michel et al., "Are sixteen heads really better than one?", arXiv 1905.10650; Wang et al.,
    "Interpretability in the wild", arXiv 2211.00593, for the mean.
    """

    parts: tuple[Part, ...]
    heads: tuple[str, ...] = ()
    neurons: tuple[str, ...] = ()
    means: Mapping[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    scope: str = "parts"
    strength: float = 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers whose writes it changes."""
        return tuple(sorted({part.layer for part in self.parts}))

    def edit(
        self, weight: torch.Tensor, write: Write, layer: int | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a matrix without the columns of the parts that go through it, in a dtype."""
        found = weight.to(dtype, copy=True)
        for part in self.parts:
            if part.write == write:
                start, stop = part.columns
                found.narrow(part.input_axis, start, stop - start).zero_()
        return found

    def describe(self, edited: int) -> str:
        """Return what writes nothing any more, in a sentence. edited: how many tensors change."""
        kinds = (("head", self.heads), ("neuron", self.neurons))
        told = [f"{kind}s {', '.join(names)}" for kind, names in kinds if names]
        what = "nothing" if self.means is None else "their mean"
        return f"{' and '.join(told)} write {what}: {edited} tensors edited"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        return {
            "scope": self.scope,
            "strength": self.strength,
            "rank": 0,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "neurons": list(self.neurons),
            **({"mean": True} if self.means is not None else {}),
        }

    def constants(self, weights: Callable[[str], torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return {layer: (hidden_size,) float64}: what the parts write of their means, W·mean.

        weights: parameter → its value in the base.
        """
        found: dict[int, torch.Tensor] = {}
        for part in self.parts:
            start, stop = part.columns
            columns = weights(part.write.parameter).narrow(part.input_axis, start, stop - start)
            columns = columns.movedim(part.write.axis, 0).double()  # (hidden_size, columns)
            written = columns @ (self.means or {})[part.name].double()
            found[part.layer] = found.get(part.layer, 0) + written
        return found


Removal = Ablation | Silence


@dataclass(frozen=True)
class MappedAblation:
    """An ablation with what writes in the model that it is taken out of."""

    writes: WriteMap
    ablation: Ablation


def orthonormalize(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an orthonormal basis of what vectors span, (vectors, hidden_size) float64.

    Raises DirectionError for one that is a sum of those before it, which takes out nothing more.
    """
    import torch

    basis: list[torch.Tensor] = []
    for index, vector in enumerate(vectors):
        unit = vector.double() / vector.double().norm()
        for _ in range(2):  # Once more: the first pass leaves rounding behind.
            for other in basis:
                unit = unit - (unit @ other) * other
        if not unit.norm() > _DEPENDENT:
            raise DirectionError(
                f"direction {index + 1} lies in what the ones before it span; leave it out"
            )
        basis.append(unit / unit.norm())
    return torch.stack(basis)


def remove(
    values: torch.Tensor, basis: torch.Tensor, strength: float = 1.0, axis: int = -1
) -> torch.Tensor:
    """Return values − strength · (their part in the subspace), along an axis; in the values' dtype.

    basis: (directions, hidden_size), orthonormal.
    """
    moved = values.movedim(axis, -1)
    if moved.shape[-1] != basis.shape[-1]:
        raise UnsupportedError(
            f"a direction of {basis.shape[-1]} numbers cannot be taken out of {tuple(values.shape)}"
        )
    rows = basis.to(moved.device, moved.dtype)
    return (moved - strength * (moved @ rows.T) @ rows).movedim(-1, axis)


def edit_weight(
    weight: torch.Tensor,
    basis: torch.Tensor,
    strength: float,
    axis: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return a parameter without its part in the subspace, computed in float64, rounded once.

    dtype: of the result; the weight's where it is None. A part of the matrix is in float64 at a time.
    """
    import torch

    rows = weight.movedim(axis, -1)
    result = torch.empty(weight.shape, dtype=dtype or weight.dtype)
    target = result.movedim(axis, -1)
    if rows.ndim == 1:
        target.copy_(remove(rows.double(), basis, strength))
        return result
    step = max(1, _CHUNK // max(1, rows[0].numel()))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        target[part] = remove(rows[part].double(), basis, strength).to(target.dtype)
    return result


def share_left(values: torch.Tensor, basis: torch.Tensor) -> float:
    """Return max |x·b| / ‖x‖ over positions and basis vectors: the remainder of an ablation.

    values: (…, hidden_size).
    """
    rows = values.reshape(-1, values.shape[-1]).double()
    found = (rows @ basis.to(rows.device).T).norm(dim=-1) / rows.norm(dim=-1).clamp(min=1e-30)
    return float(found.max())
