"""`bake.json` of an ablation: what was taken out of what, and how that is read back.

A direction that was taken out is a direction file beside the weights; a subspace is what several of them
span, orthonormalised in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base
from bake.anatomy.parts import find_parts, parse_heads, parse_neurons
from bake.checkpoint.loading import auto_class
from bake.directions.direction import Direction
from bake.directions.direction_file import load_direction
from bake.directions.subspace import span
from bake.errors import CheckpointError
from bake.io.output_files import DIRECTION_FILE, number_file
from bake.pipeline.about import About
from bake.pipeline.record import describe_left_out, stored_dtype
from bake.plan.ablation import AblationPlan, plan_ablation
from bake.sweeps.layer_choice import LayerChoice
from bake.version import __version__
from bake.writes import Ablation


def describe_ablation(
    base: Base,
    plan: AblationPlan,
    directions: Sequence[Direction],
    about: About,
    choice: LayerChoice | None = None,
) -> dict[str, Any]:
    """Return the part of `bake.json` that says what was done; plain values, no times, no paths."""
    left_out = describe_left_out(base, plan)
    return {
        "version": 1,
        "bake_version": __version__,
        "base": base.named(),
        "about": about.to_dict(),
        "licence": base.licence,
        "architecture": base.anatomy.architecture,
        "auto_class": auto_class(base.anatomy.config).__name__,
        "layer_count": base.anatomy.layer_count,
        "hidden_size": base.anatomy.hidden_size,
        "ablation": plan.ablation.to_dict(),
        **({"layer_choice": choice.to_dict()} if choice else {}),
        "removed": [
            {**direction.to_dict(), "file": number_file(DIRECTION_FILE, index)}
            for index, direction in enumerate(directions)
        ],
        "plan": plan.to_dict(),
        **({"left_out": [entry.to_dict() for entry in left_out]} if left_out else {}),
    }


def rebuild_ablation(recorded: Mapping[str, Any], opened: Base, directory: Path) -> AblationPlan:
    """Return the plan of an ablation from its record, its direction files and its base."""
    entries, told = recorded["removed"], recorded["ablation"]
    dtype = stored_dtype(recorded)
    if told["scope"] == "parts":
        heads, neurons = (",".join(told.get(key, ())) for key in ("heads", "neurons"))
        silence = find_parts(
            opened.anatomy,
            parse_heads(heads) if heads else (),
            parse_neurons(neurons) if neurons else (),
        )
        return plan_ablation(opened.checkpoint, opened.anatomy, silence, dtype=dtype)
    names = [number_file(DIRECTION_FILE, index) for index in range(len(entries))]
    if [entry["file"] for entry in entries] != names:
        raise CheckpointError(f"bake.json in {directory} names other direction files than bake's")
    directions = [load_direction(directory / entry["file"]) for entry in entries]
    if not directions:
        raise CheckpointError(f"bake.json in {directory} names no direction that was taken out")
    beyond = [layer for layer in told["layers"] if layer >= opened.anatomy.layer_count]
    if beyond:
        raise CheckpointError(
            f"bake.json in {directory} names layer {beyond[0]}, which there is not"
        )
    whole = told["layers"] == list(range(opened.anatomy.layer_count)) and told["strength"] == 1
    if told["scope"] == "stream" and not whole:
        raise CheckpointError(
            f"bake.json in {directory} is damaged: a stream is ablated in all layers, by all of it"
        )
    basis = span(directions, told["layers"], opened.anatomy.hidden_size)
    ablation = Ablation(basis, told["scope"], float(told["strength"]))
    return plan_ablation(opened.checkpoint, opened.anatomy, ablation, dtype=dtype)
