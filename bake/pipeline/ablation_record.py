"""`bake.json` of an ablation: what was taken out of what, and how that is read back.

A direction that was taken out is a direction file beside the weights; a subspace is what several of them
span, orthonormalised in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base
from bake.anatomy.parts import find_parts, parse_heads, parse_neurons
from bake.checkpoint.loading import auto_class
from bake.directions.direction import Direction
from bake.directions.direction_file import load_direction
from bake.directions.subspace import span
from bake.errors import CheckpointError
from bake.io.foreign_paths import check_links
from bake.io.output_files import DIRECTION_FILE, MEANS_FILE, number_file
from bake.io.safetensors import decode_tensor, read_header, read_range
from bake.pipeline.about import About
from bake.pipeline.record import describe_left_out, stored_dtype
from bake.plan.ablation import AblationPlan
from bake.plan.means import plan_removal
from bake.sweeps.layer_choice import LayerChoice
from bake.version import __version__
from bake.writes import Ablation, Removal, Silence


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
        if told.get("mean"):
            silence = replace(silence, means=_read_means(silence, directory))
        return plan_removal(opened.checkpoint, opened.anatomy, silence, dtype=dtype)
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
    return plan_removal(opened.checkpoint, opened.anatomy, ablation, dtype=dtype)


def write_means(removal: Removal, folder: Path) -> None:
    """Write the means that heads or neurons are given beside the weights, where they are given any."""
    from safetensors.torch import save_file

    if isinstance(removal, Silence) and removal.means is not None:
        means = {name: mean.contiguous() for name, mean in removal.means.items()}
        save_file(means, folder / MEANS_FILE)


def _read_means(silence: Silence, directory: Path) -> dict[str, Any]:
    """Read the means of heads or neurons; raise CheckpointError where they are not those that it names."""
    path = directory / MEANS_FILE
    check_links(directory, (MEANS_FILE,))
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks {MEANS_FILE}, which its bake.json is about")
    header = read_header(path, MEANS_FILE)
    means = {
        entry.name: decode_tensor(
            read_range(path, entry.start, entry.end), entry.dtype, entry.shape
        )
        for entry in header.tensors
    }
    for part in silence.parts:
        width = part.columns[1] - part.columns[0]
        found = means.get(part.name)
        if found is None or found.shape != (width,) or not found.isfinite().all():
            raise CheckpointError(f"{MEANS_FILE} has no mean of {width} numbers for {part.name}")
    return means
