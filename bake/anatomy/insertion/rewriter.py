"""Insertion: one extra stock decoder layer after each pushed one, which only adds the push.

Exact without any new architecture, at the price of the layer's weights (nearly all zeros) and its
compute. Old layers keep their bytes and get new numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bake.anatomy.flags import Shapes, parameter_shapes
from bake.anatomy.insertion.filling import Filling, set_constant
from bake.anatomy.insertion.growth import Growth, Place, plan_growth
from bake.anatomy.insertion.layers_on_disk import find_layers
from bake.anatomy.rewriting import Rewritten
from bake.checkpoint.edits import Add, Drop, Edit, Rename, Transform
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.errors import CheckpointError, UnsupportedError
from bake.io.safetensors import TensorEntry, torch_dtype
from bake.sites import Slot

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from bake.checkpoint.checkpoint import Checkpoint

_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old checkpoints carry and no model reads: they are computed.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$")
_EXPERT = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
class Insertion:
    """The rewriter. path: of the list of decoder layers in the model, which is the same afterwards.

    layer_parameters: how many parameters the largest layer has that may be inserted.
    """

    path: str
    filling: Filling
    layer_count: int
    hidden_size: int
    layer_parameters: int

    @property
    def name(self) -> str:
        """What it turns the base into."""
        return "extra layers"

    @property
    def lossless(self) -> bool:
        """Every weight of the base keeps its bytes."""
        return True

    def describe(self) -> str:
        """Say in a phrase how the route works and what it costs."""
        return (
            f"an extra layer after each pushed one, which only adds the push ({self.filling.describe()}): "
            f"each adds {_count(self.layer_parameters)} parameters and 1/{self.layer_count} of the "
            f"model's compute"
        )

    @property
    def caveat(self) -> str | None:
        """What the route is exact up to; None where nothing is to be said."""
        if self.filling.source != "squares" or self.filling.slot is not None:
            return None
        return (
            "summed squares are exact up to the norm's epsilon over the mean square of the residual "
            "stream, which is too small for that in a pushed layer of this model"
        )

    def describe_cost(self, layers: int) -> str:
        """Say what `layers` pushed layers cost."""
        return (
            f"{layers} decoder layers are added to {self.layer_count}: "
            f"{_count(layers * self.layer_parameters)} parameters more, "
            f"{layers / self.layer_count:.0%} more compute and key-value cache for every token"
        )

    def rewrite(
        self,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        layers: Sequence[int],
        dtype: str | None = None,
    ) -> Rewritten:
        """See `Rewriter`. Raises UnsupportedError where old layers would not stay what they are."""
        growth = plan_growth(config, checkpoint.config_text, self.path, self.filling, layers)
        before = build_on_meta(config)
        work = _Rewriting(self, checkpoint, growth, before, dtype)
        edits = [*work.old_layers(), *work.new_biases(), *work.new_layers()]
        return Rewritten(tuple(edits), growth.changes, work.slots, work.names)


class _Rewriting:
    """The edits of one rewriting, in the making."""

    def __init__(
        self,
        insertion: Insertion,
        checkpoint: Checkpoint,
        growth: Growth,
        before: nn.Module,
        dtype: str | None,
    ) -> None:
        self.insertion = insertion
        self.filling = insertion.filling
        self.checkpoint = checkpoint
        self.places = growth.places
        self.after: Any = growth.model.get_submodule(insertion.path)
        self.after_shapes = parameter_shapes(growth.model)
        self.widened = _find_widened(checkpoint, before, self.after_shapes, self.places)
        self.plain = parameter_shapes(before)
        self.dtype = dtype
        self.disk = find_layers(checkpoint, insertion.path, insertion.layer_count)
        self.moved = {
            place.source: index for index, place in enumerate(self.places) if not place.inserted
        }
        self.width = insertion.hidden_size
        self.slots: dict[int, tuple[Slot, ...]] = {}
        self.names: dict[str, str] = {}
        self._made: dict[tuple, torch.Tensor] = {}

    def old_layers(self) -> Iterator[Edit]:
        """Yield the edits of what the base has: other numbers, and another dtype if one is wanted."""
        for name, entry in self.checkpoint.tensors.items():
            place = self.disk.split(name)
            if place is None:
                new_name = name
            elif place[0] in self.moved:
                new_name = self.disk.name(self.moved[place[0]], place[1])
            else:
                yield Drop(name)  # Beyond the model's last layer: no model reads it.
                continue
            if name in self.widened:
                yield _widen(entry, self.widened[name], self.places, self.dtype or entry.dtype)
            elif self.dtype is not None and entry.dtype in _FLOATS and entry.dtype != self.dtype:
                yield _convert(name, new_name, entry, self.dtype)
            elif new_name != name:
                yield Rename(name, new_name)

    def new_biases(self) -> Iterator[Edit]:
        """Yield zeros for the biases that a flag creates in the old layers."""
        import torch

        for source, index in self.moved.items():
            prefix = f"{self.insertion.path}.{index}."
            for parameter, shape in self.after_shapes.items():
                inside = parameter.removeprefix(prefix)
                if inside == parameter or f"{self.insertion.path}.{source}.{inside}" in self.plain:
                    continue
                self.checkpoint.check_new(self.disk.name(source, inside))
                code = self._beside(source, inside).dtype
                yield Add(
                    self.disk.name(index, inside), torch.zeros(shape, dtype=self._dtype(code))
                )

    def new_layers(self) -> Iterator[Edit]:
        """Yield the tensors of the inserted layers, zero but for the filling's constants and slots."""
        pushed = 0
        for index, place in enumerate(self.places):
            if not place.inserted:
                pushed = place.source
                continue
            held = self._layer(index, place.source)
            if self.filling.slot is None or self.filling.source == "squares":
                downs = self._fill_squares(index, place.source, held)
            if self.filling.slot is None:
                self.slots[pushed] = tuple(downs)
            else:
                if self.filling.slot.bias not in held:
                    raise self._absent(place.source, self.filling.slot.bias)
                bias = f"{self.insertion.path}.{index}.{self.filling.slot.bias}"
                self.slots[pushed] = (replace(self.filling.slot, bias=bias),)
                self.names[bias] = self.disk.name(index, self.filling.slot.bias)
            for inside, tensor in held.items():
                yield Add(self.disk.name(index, inside), tensor)

    def _layer(self, index: int, donor: int) -> dict[str, torch.Tensor]:
        """Return an inserted layer's tensors: the donor's names, the flags' biases, the constants."""
        held: dict[str, torch.Tensor] = {}
        for inside, entry in self.disk.layers[donor].items():
            if _COMPUTED.search(inside):
                continue
            if entry.dtype not in _FLOATS:
                raise UnsupportedError(
                    f"{self.disk.name(donor, inside)} is stored as {entry.dtype}: layers can be inserted "
                    f"into float checkpoints only; use the unquantised base"
                )
            held[inside] = _zeros(entry.shape, self._dtype(entry.dtype))
        prefix = f"{self.insertion.path}."
        for inside, shape in parameter_shapes(self.after[index]).items():
            if f"{prefix}{donor}.{inside}" not in self.plain:
                held[inside] = _zeros(shape, self._dtype(self._beside(donor, inside).dtype))
        for inside, buffer in self.after[index].state_dict(keep_vars=True).items():
            if buffer.numel() == 1 and inside in held:
                held[inside] = held[inside] + 1  # A factor on the layer's output.
        for constant in self.filling.constants:
            if constant.parameter not in held and self.filling.source == "squares":
                continue  # A norm that layers of another kind have.
            if constant.parameter not in held:
                raise self._absent(donor, constant.parameter)
            key = (constant, tuple(held[constant.parameter].shape))
            held[constant.parameter] = self._share(key, held[constant.parameter], constant)
        return held

    def _share(self, key: tuple, empty: torch.Tensor, constant: Any) -> torch.Tensor:
        """Return a filled tensor, the same object for all layers: they differ in the slots alone."""
        if key not in self._made:
            filled = empty.contiguous().clone()
            set_constant(filled, constant)
            self._made[key] = filled
        return self._made[key]

    def _fill_squares(
        self, index: int, donor: int, held: dict[str, torch.Tensor]
    ) -> Iterator[Slot]:
        """Fill every gated MLP of the layer; return a slot for each of their output projections."""
        found = []
        for inside, inner in _output_projections(self.disk.layers[donor], self.width):
            parent = inside.rpartition(".")[0].rpartition(".")[0]
            readers = [
                other
                for other, entry in self.disk.layers[donor].items()
                if other.startswith(f"{parent}.")
                and other.rpartition(".")[0].rpartition(".")[0] == parent
                and len(entry.shape) == 2
                and entry.shape[1] == self.width
                and entry.shape[0] % inner == 0
            ]
            for reader in readers:
                held[reader] = self._identities(held[reader], inner)
            if self.filling.slot is not None:
                held[inside] = self._average(held[inside])
            elif readers:
                found.append(self._slot(index, inside))
        if self.filling.slot is None and not found:
            raise UnsupportedError(
                f"no MLP of layer {donor} has an inner size of at least twice the hidden size "
                f"({2 * self.width}), so none can sum the squares of its input"
            )
        return iter(found)

    def _identities(self, empty: torch.Tensor, inner: int) -> torch.Tensor:
        """Return a matrix (inner or a multiple, hidden size): identity, its negative, zeros below."""
        import torch

        key = ("identities", tuple(empty.shape), empty.dtype)
        if key not in self._made:
            filled = torch.zeros(tuple(empty.shape), dtype=empty.dtype)
            diagonal = torch.arange(self.width)
            for start in range(0, filled.shape[0], inner):
                filled[start + diagonal, diagonal] = 1
                filled[start + self.width + diagonal, diagonal] = -1
            self._made[key] = filled
        return self._made[key]

    def _average(self, empty: torch.Tensor) -> torch.Tensor:
        """Return an output projection (hidden size, inner) that makes the summed squares one."""
        import torch

        key = ("average", tuple(empty.shape), empty.dtype)
        if key not in self._made:
            filled = torch.zeros(tuple(empty.shape), dtype=empty.dtype)
            filled[:, : 2 * self.width] = 1 / self.width
            self._made[key] = filled
        return self._made[key]

    def _slot(self, index: int, inside: str) -> Slot:
        """Return the slot of an output projection, an expert's part of one where they are fused."""
        prefix = f"{self.insertion.path}.{index}."
        name, part = f"{prefix}{inside}", None
        if name not in self.after_shapes:
            name, part = self._fused(index, inside)
        slot = Slot(
            name,
            scale=self.filling.scale * self.width,
            axis=0,
            span=(0, 2 * self.width),
            part=part,
        )
        self.names[slot.key] = self.disk.name(index, inside)
        return slot

    def _fused(self, index: int, inside: str) -> tuple[str, int]:
        """Return (parameter, part of it) of an expert's matrix, which transformers merges on loading."""
        shape = tuple(self.disk.layers[self.places[index].source][inside].shape)
        expert = _EXPERT.search(inside)
        prefix = f"{self.insertion.path}.{index}."
        found = [
            name
            for name, merged in self.after_shapes.items()
            if name.startswith(prefix) and len(merged) == 3 and merged[1:] == shape
        ]
        if expert is None or len(found) != 1:
            raise UnsupportedError(
                f"{self.disk.name(index, inside)} becomes another parameter on loading, and which is "
                f"not known; another route is needed"
            )
        return found[0], int(expert[1])

    def _beside(self, layer: int, bias: str) -> TensorEntry:
        """Return the entry of the weight beside a new bias, as it is named on disk."""
        weight = bias.removesuffix("bias") + "weight"
        entry = self.disk.layers[layer].get(weight)
        if entry is None:
            raise CheckpointError(
                f"{self.checkpoint.model_id} has no tensor {self.disk.name(layer, weight)}, beside which "
                f"the new {bias} would stand; is the checkpoint complete?"
            )
        return entry

    def _absent(self, layer: int, inside: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.model_id} has no tensor {self.disk.name(layer, inside)}, or calls it "
            f"otherwise on disk"
        )

    def _dtype(self, code: str) -> torch.dtype:
        return torch_dtype(self.dtype or code)


def _output_projections(layer: Mapping[str, TensorEntry], width: int) -> Iterator[tuple[str, int]]:
    """Yield (name, inner size) of matrices (hidden size, inner) with room for all squares twice."""
    for inside, entry in layer.items():
        shape = entry.shape
        if len(shape) == 2 and shape[0] == width and shape[1] >= 2 * width and "attn" not in inside:
            yield inside, shape[1]


def _find_widened(
    checkpoint: Checkpoint, before: nn.Module, after: Shapes, places: Sequence[Place]
) -> dict[str, int]:
    """Return {name on disk: axis} of tensors outside the layers that hold a piece of each layer's."""
    count, grown = sum(not place.inserted for place in places), len(places)
    plain = parameter_shapes(before)
    changed = {
        name: axis
        for name, shape in plain.items()
        if name in after and len(after[name]) == len(shape)
        for axis, (old, new) in enumerate(zip(shape, after[name], strict=True))
        if old != new and old * grown == new * count
    }
    if not changed:
        return {}
    names = DiskNames(checkpoint, before)
    return {names.existing(name): axis for name, axis in changed.items()}


def _widen(entry: TensorEntry, axis: int, places: Sequence[Place], code: str) -> Transform:
    """Return the edit that puts an empty piece in for every inserted layer."""
    count = sum(not place.inserted for place in places)
    shape = list(entry.shape)
    shape[axis] = shape[axis] // count * len(places)

    def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        pieces = tensor.to(torch_dtype(code)).chunk(count, dim=axis)
        empty = torch.zeros_like(pieces[0])
        laid = [empty if place.inserted else pieces[place.source] for place in places]
        return {entry.name: torch.cat(laid, dim=axis)}

    return Transform(entry.name, {entry.name: tuple(shape)}, function, dtype=code)


def _convert(name: str, new_name: str, entry: TensorEntry, code: str) -> Transform:
    def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {new_name: tensor.to(torch_dtype(code))}

    return Transform(name, {new_name: tuple(entry.shape)}, function, dtype=code)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take no memory: the writer makes one tensor at a time of them."""
    import torch

    return torch.zeros((), dtype=dtype).expand(tuple(shape))


def _count(parameters: int) -> str:
    """Return a number of parameters as people write it."""
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if parameters >= factor:
            return f"{parameters / factor:.3g} {unit}"
    return f"{parameters:,}"
