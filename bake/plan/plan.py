"""The edits: anatomy + push → the complete list of tensor edits and config edits.

Everything is decided here, from headers and (for W·v) one matrix at a time; the writer only executes.
What each slot had, what it is pushed by and what it will hold stay in the plan, because the proof of
equivalence needs all three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from bake.anatomy import Anatomy, SiteRoute
from bake.anatomy.flags import with_flags
from bake.anatomy.folding import SlotEdit, fold_push, place_push
from bake.anatomy.insertion import Insertion
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import REMOVED, Add, Edit, Patch, Transform
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.quantization import quantization_method
from bake.engines.survival import Outline
from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.io.safetensors import torch_dtype
from bake.plan.ablation import AblationPlan
from bake.plan.dtypes import FLOAT_DTYPES, convert_others, dtype_changes
from bake.sites import Slot

if TYPE_CHECKING:
    import torch


class Changes(Protocol):
    """What the writer and the record ask of a plan, whatever it is for."""

    @property
    def edits(self) -> tuple[Edit, ...]: ...

    @property
    def config_changes(self) -> Mapping[str, Any]: ...

    @property
    def carries_drafts(self) -> bool: ...


class Pushed(Protocol):
    """What the slots are to add: {layer: (hidden_size,) tensor}, and the strength to name in a message."""

    @property
    def vectors(self) -> Mapping[int, torch.Tensor]: ...

    @property
    def multiplier(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """Everything that a bake changes. What is not named here keeps its bytes.

    ablation: what is taken out before it is pushed; its edits are among `edits`.
    """

    route: SiteRoute
    edits: tuple[Edit, ...]
    config_changes: Mapping[str, Any]
    slot_edits: tuple[SlotEdit, ...]
    dtype: str
    ablation: AblationPlan | None = None

    @property
    def representation_error(self) -> float:
        """The largest over all slots; see SlotEdit."""
        return max(edit.representation_error for edit in self.slot_edits)

    @property
    def added_layers(self) -> int:
        """How many decoder layers the output has beyond its base's."""
        inserts = isinstance(self.route.rewriter, Insertion)
        return len({edit.layer for edit in self.slot_edits}) if inserts else 0

    @property
    def slots_are_new(self) -> bool:
        """Whether every slot is created by the bake, so that it holds the push and nothing else."""
        return all(edit.is_new for edit in self.slot_edits)

    def outline(self, model_type: str, rotation: Mapping[str, Any] | None) -> Outline:
        """Return what an engine sees of the output; model_type, rotation: the base's."""
        outlined = self.route.rewritten
        return Outline(
            self.config_changes.get("model_type", model_type),
            pushed=tuple(edit.parameter for edit in self.slot_edits),
            created=tuple(edit.name for edit in self.edits if isinstance(edit, Add)),
            settings=dict(outlined.settings if outlined else self.route.flags),
            # A host's config.json has both spellings.
            rotation=rotation if self.route.rewriter is None else None,
        )

    @property
    def carries_drafts(self) -> bool:
        """Whether files of multi-token prediction are kept: where every layer keeps its name."""
        return self.route.rewriter is None and self.ablation is None

    @property
    def config_values(self) -> dict[str, Any]:
        """The config keys that are set, and their values."""
        return {k: v for k, v in self.config_changes.items() if v is not REMOVED}

    @property
    def config_removed(self) -> list[str]:
        """The config keys that go, because they mean nothing in the new form."""
        return [key for key, value in self.config_changes.items() if value is REMOVED]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`: names and config keys, not vectors."""
        removed = {"config_removed": self.config_removed} if self.config_removed else {}
        added = [edit.name for edit in self.edits if isinstance(edit, Add)]
        patched = {edit.name for edit in self.slot_edits if not edit.is_new}
        if self.ablation is not None:
            added += self.ablation.untied_heads
            patched |= set(self.ablation.edited)
        return {
            "added": sorted(added),
            "patched": sorted(patched),
            "config_changes": self.config_values,
            **removed,
            "dtype": self.dtype,
            "slots": [edit.to_dict() for edit in self.slot_edits],
        }


def make_plan(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    route: SiteRoute,
    push: Pushed,
    *,
    dtype: str | None = None,
    ablation: AblationPlan | None = None,
) -> Plan:
    """Decide every edit. dtype: "float32" stores the whole checkpoint so; None keeps the base's.

    ablation: what is taken out first, planned with the same dtype; a slot then holds what is left of the
    base's bias, and the push. Raises CheckpointError where the checkpoint lacks a tensor that the route
    needs or it has another shape, UnsupportedError where a slot is not stored as a float the push can be
    written into, and where the route does not leave the base's tensors in their places for an ablation.
    """
    import torch

    _check_request(checkpoint, route, dtype)
    check_ablated_route(route, ablation)
    if route.kind == "value" and dtype not in (None, "float32"):
        raise UnsupportedError(
            f"value biases are solved for the matrices as they are, and {dtype} would change both: leave "
            f"--dtype out, or --dtype float32"
        )
    if route.rewriter is not None:
        code = FLOAT_DTYPES[dtype] if dtype else None
        rewritten = route.rewriter.rewrite(checkpoint, anatomy.config, sorted(push.vectors), code)
        folded = fold_push(rewritten, push.vectors, checkpoint.read)
        _check_finite(push, folded)
        edits = tuple(place_push(rewritten, folded))
        changes = _effective(
            checkpoint.config, {**rewritten.config_changes, **dtype_changes(checkpoint, dtype)}
        )
        return Plan(route, edits, changes, folded, dtype or "as the base")
    names = _disk_names(checkpoint, anatomy, route)
    vectors = push.vectors
    slot_edits = [
        _edit_slot(checkpoint, names, layer, slot, vectors[layer], dtype, ablation)
        for layer in sorted(vectors)
        for slot in route.slots_of(layer)
    ]
    _check_finite(push, slot_edits)
    stored = {edit.name: edit.stored for edit in slot_edits}
    made: list[Add | Patch | Transform] = []
    for parameter, shape in route.new_parameters.items():
        name, weight = names.new_bias(parameter)
        code = FLOAT_DTYPES[dtype] if dtype else _dtype_beside(checkpoint, weight)
        filled = stored[name] if name in stored else torch.zeros(shape, dtype=torch_dtype(code))
        made.append(Add(name, filled))
    converted = convert_others(checkpoint, FLOAT_DTYPES[dtype], stored) if dtype else []
    transformed = {edit.name for edit in converted}
    made += converted
    made += [
        Patch(edit.name, edit.stored)
        for edit in slot_edits
        if not edit.is_new and edit.name not in transformed
    ]
    changes = {**route.flags, **dtype_changes(checkpoint, dtype)}
    if ablation is not None:
        erased = [
            edit
            for edit in ablation.edits
            if isinstance(edit, Transform)
            and edit.name in ablation.edited
            and edit.name not in stored
        ]
        others = {edit.name for edit in erased}
        made = [*erased, *(edit for edit in made if edit.name not in others)]
        changes = {**ablation.config_changes, **changes}
    return Plan(route, tuple(made), changes, tuple(slot_edits), dtype or "as the base", ablation)


def check_ablated_route(route: SiteRoute, ablation: AblationPlan | None) -> None:
    """Raise UnsupportedError for a route that rewrites the model in which something is taken out."""
    if ablation is not None and route.rewriter is not None:
        raise UnsupportedError(
            f"--ablate goes with a push into the base's own layers, and the route {route.route} "
            f"({route.rewriter.name}) writes others: take it out first (bake ablate), then bake export of "
            "what that wrote, or choose a --site with a slot in place"
        )


def outline_edits(
    checkpoint: Checkpoint,
    anatomy: Anatomy,
    route: SiteRoute,
    layers: Sequence[int],
    *,
    dtype: str | None = None,
) -> tuple[Edit, ...]:
    """Return the edits of a push on `layers` in names, shapes and dtypes: their values are not there.

    Nothing of the weights is read. Raises as `make_plan`.
    """
    import torch

    _check_request(checkpoint, route, dtype)
    if route.rewriter is not None:
        code = FLOAT_DTYPES[dtype] if dtype else None
        return route.rewriter.rewrite(checkpoint, anatomy.config, layers, code).edits
    names = _disk_names(checkpoint, anatomy, route)
    edits: list[Edit] = []
    for parameter, shape in route.new_parameters.items():
        name, weight = names.new_bias(parameter)
        code = FLOAT_DTYPES[dtype] if dtype else _dtype_beside(checkpoint, weight)
        edits.append(Add(name, torch.empty(shape, dtype=torch_dtype(code), device="meta")))
    converted = convert_others(checkpoint, FLOAT_DTYPES[dtype], {}) if dtype else []
    transformed = {edit.name for edit in converted}
    slots = [slot.bias for layer in layers for slot in route.slots_of(layer)]
    existing = {names.existing(bias) for bias in slots if bias not in route.new_parameters}
    for name in sorted(existing - transformed):
        entry = checkpoint.entry(name)
        value = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")
        edits.append(Patch(name, value))
    return (*edits, *converted)


def _check_request(checkpoint: Checkpoint, route: SiteRoute, dtype: str | None) -> None:
    """Raise UnsupportedError for a dtype that is none, and for what a quantised base cannot be."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UnsupportedError(f"unknown dtype {dtype!r}; one of {', '.join(FLOAT_DTYPES)}")
    method = quantization_method(checkpoint.config)
    if method is not None and dtype is not None:
        raise UnsupportedError(
            f"{checkpoint.model_id} is quantised ({method}) and cannot be stored as {dtype}; leave "
            f"--dtype out, or bake the unquantised base"
        )
    if method is not None and route.rewriter is not None:
        raise UnsupportedError(
            f"{checkpoint.model_id} is quantised ({method}), and the route {route.route} "
            f"({route.rewriter.name}) rewrites weights; choose a --site with a slot in place, or bake "
            f"the unquantised base"
        )


def _check_finite(push: Pushed, edits: Sequence[SlotEdit]) -> None:
    for edit in edits:
        if not edit.stored.isfinite().all():
            dtype = str(edit.stored.dtype).removeprefix("torch.")
            raise BakeError(
                f"multiplier {push.multiplier:g} is more than {edit.name} can hold in {dtype}; give one "
                f"nearer to 1"
            )


def _dtype_beside(checkpoint: Checkpoint, weight: str) -> str:
    """Return the dtype code of a new bias: its weight's, or the model's own where that is quantised."""
    code = checkpoint.entry(weight).dtype
    if code in FLOAT_DTYPES.values():
        return code
    nested = checkpoint.config.get("text_config")
    for values in (nested if isinstance(nested, Mapping) else {}, checkpoint.config):
        stated = values.get("dtype") or values.get("torch_dtype")
        if isinstance(stated, str) and stated in FLOAT_DTYPES:
            return FLOAT_DTYPES[stated]
    # The norms are never quantised.
    counted = Counter(e.dtype for e in checkpoint.tensors.values() if len(e.shape) == 1)
    return next(
        (found for found, _ in counted.most_common() if found in FLOAT_DTYPES.values()), code
    )


def _disk_names(checkpoint: Checkpoint, anatomy: Anatomy, route: SiteRoute) -> DiskNames:
    """Return the names on disk of the baked architecture's parameters, new ones included."""
    return DiskNames(checkpoint, build_on_meta(with_flags(anatomy.config, route.flags)))


def _edit_slot(
    checkpoint: Checkpoint,
    names: DiskNames,
    layer: int,
    slot: Slot,
    vector: torch.Tensor,
    dtype: str | None,
    ablation: AblationPlan | None,
) -> SlotEdit:
    weight = names.read(slot.weight) if slot.weight else None
    found = names.find(slot.bias)
    shape = checkpoint.entry(found).shape if found else None
    delta = slot.delta(vector, weight, shape)
    if found is None:
        name, beside = names.new_bias(slot.bias)
        code, old = _dtype_beside(checkpoint, beside), delta.new_zeros(delta.shape)
    else:
        name, code, old = found, checkpoint.entry(found).dtype, checkpoint.read(found).double()
        if ablation is not None:
            old = ablation.exact(slot.bias, old)
    if code not in FLOAT_DTYPES.values():
        raise UnsupportedError(
            f"{name} would be stored as {code}, which cannot hold a push; use a float base"
        )
    if old.shape != delta.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(old.shape)}, the push needs {tuple(delta.shape)}; "
            f"is this checkpoint the architecture that its config names?"
        )
    target = torch_dtype(FLOAT_DTYPES[dtype] if dtype else code)
    return SlotEdit(
        layer,
        slot,
        slot.bias,
        name,
        found is None,
        old,
        delta,
        (old + delta).to(target),
        names.find(slot.weight) if slot.weight else None,
    )


def _effective(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the changes of keys that have the new value already, or are not there to be removed."""
    return {
        key: value
        for key, value in changes.items()
        if "." in key or config.get(key, REMOVED) != value
    }
