"""What a checkpoint shows by itself: only what a model of its family cannot have, or hardly ever has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from bake.anatomy.base import Base
from bake.anatomy.flags import unusual_biases
from bake.checkpoint.names import DiskNames
from bake.checkpoint.ranged import RangedTensors
from bake.detection.constant_inputs import find_constant_inputs
from bake.detection.constant_layers import find_constant_layers
from bake.detection.disguise import find_disguise
from bake.detection.findings import Detection, PushFound
from bake.detection.recovery import Slots, find_loose, recover_pushes
from bake.detection.removal import find_common_gap, find_writes, gap_matrices
from bake.detection.steps import LEAST, find_step, list_scores, read_step

if TYPE_CHECKING:
    import torch

CHEAP = 0.01  # of a checkpoint on the Hub
COHERENT = 0.5  # mean cosine of neighbouring layers, above which created biases are a push


def look_alone(opened: Base, tensors: RangedTensors, names: DiskNames) -> Detection:
    """Return what a suspect shows by itself. tensors, names: its own."""
    anatomy = opened.anatomy
    unusual = unusual_biases(anatomy.config)
    tensors.prefetch(name for each in unusual if (name := names.find(each)) is not None)

    def old(parameter: str, name: str) -> torch.Tensor | None:
        import torch

        if parameter not in unusual:
            return None
        return torch.zeros(tuple(opened.checkpoint.entry(name).shape), dtype=torch.float64)

    pushes = [
        push
        for push in recover_pushes(tensors, anatomy, names, old)
        if push.fits
        and (
            (push.coherence > COHERENT and len(push.vectors) < anatomy.layer_count)
            or push.coherence > 0.9
        )
    ]
    pushes += find_loose(tensors, anatomy)
    taken = {parameter for push in pushes for parameter in push.parameters}
    scored = list(score_trained(opened, tensors, names, unusual | taken))
    pushes += [push for push in scored if push.step and push.step.is_found]
    layers = find_constant_layers(opened, tensors)
    pushes += find_constant_inputs(tensors)
    in_layers = {parameter for push in layers for parameter in push.parameters}
    pushes = [push for push in pushes if not in_layers & {*push.parameters}] + layers
    writes = find_writes(anatomy)
    width = anatomy.hidden_size
    notes = [*find_disguise(opened, tensors)]
    ablation = None
    if writes is not None and not layers:  # Emptied layers write next to nothing.
        matrices = [name for name, _ in gap_matrices(tensors, names, writes)]
        if is_cheap(tensors, matrices):
            ablation = find_common_gap(tensors, names, writes, width)
        else:
            notes.append(_too_much(tensors, matrices, "an ablation"))
    unsure = [(push.site, push.step) for push in scored if push.step and not push.step.is_found]
    if unsure:
        notes.append(
            f"this family's own biases were scored for a step and its return: {list_scores(unsure)} (a "
            f"push from {LEAST:g} on): a weaker one, or one that reaches the last layer, cannot be told "
            "from training without the base: give it with --base"
        )
    notes.append(
        "without a base, only what this family cannot have by itself is found: an ablation of some layers, "
        "and most of what is hidden in trained values, are not"
    )
    return Detection(
        opened.to_dict()["id"],
        None,
        tuple(pushes),
        (ablation,) if ablation else (),
        notes=tuple(notes),
        explained=tuple(sorted(_created(opened, names, pushes, unusual))),
    )


def is_cheap(tensors: RangedTensors, names: Iterable[str | None]) -> bool:
    """Tell whether matrices may be read whole: they are here, or little of what lies on the Hub."""
    away = [name for name in names if name is not None and not tensors.is_here(name)]
    size = sum(tensors.checkpoint.entry(name).size for name in away)
    return size <= CHEAP * tensors.checkpoint.size


def _too_much(tensors: RangedTensors, names: Sequence[str], what: str) -> str:
    size = sum(tensors.checkpoint.entry(name).size for name in names)
    return (
        f"{what} was not looked for: it takes {size / 1e9:.3g} GB from the Hub; download the checkpoint "
        "and give its directory"
    )


def _created(
    opened: Base, names: DiskNames, pushes: Sequence[PushFound], unusual: frozenset[str]
) -> Iterator[str]:
    """Yield the tensors that were created for pushes, whatever they hold."""
    loaded = [push for push in pushes if push.loaded]
    if loaded:
        yield from (name for each in unusual if (name := names.find(each)) is not None)
    for push in pushes:
        if not push.loaded:
            yield from push.parameters


def score_trained(
    opened: Base, tensors: RangedTensors, names: DiskNames, unlike: Set[str]
) -> Iterator[PushFound]:
    """Yield what slots hold that a model of the family has itself, scored for a step and its return.

    unlike: parameters that the family does not have, or that are explained.
    """
    import torch

    def old(parameter: str, name: str) -> torch.Tensor | None:
        if parameter in unlike:
            return None
        return torch.zeros(tuple(opened.checkpoint.entry(name).shape), dtype=torch.float64)

    slots = Slots(tensors, names, old)
    found: dict[frozenset[str], PushFound] = {}
    for route in opened.anatomy.routes:
        if route.route != "native" or route.rewriter is not None or route.kind == "value":
            continue
        slots_of = [slot for layer in route.layers for slot in route.slots_of(layer)]
        weights = {names.find(slot.weight) for slot in slots_of if slot.weight}
        if not is_cheap(tensors, weights - {None}):
            continue
        tensors.prefetch(
            name
            for slot in slots_of
            if slot.bias not in unlike and (name := names.find(slot.bias)) is not None
        )
        push = slots.recover(route)
        if push is None:
            continue
        nothing = torch.zeros(opened.anatomy.hidden_size, dtype=torch.float64)
        held = {layer: push.vectors.get(layer, nothing) for layer in route.layers}
        step = find_step(held)
        if step is None:
            continue
        kept = range(step.first, step.stop)
        push = replace(
            push,
            vectors=read_step(held, step),
            residuals={layer: push.residuals.get(layer, 0.0) for layer in kept},
            step=step,
        )
        # Two routes may read one bias: what steps most is kept.
        key = frozenset(push.parameters)
        other = found.get(key)
        if other is None or (other.step is not None and other.step.margin < step.margin):
            found[key] = push
    yield from found.values()
