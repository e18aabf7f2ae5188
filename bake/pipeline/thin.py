"""A thin bake: only what is new, decided from config and headers, without one weight of the base.

For a model that fits no machine at hand, or whose weights lie elsewhere: a direction file, a saved
calibration and a config flag that creates the slots say everything. The directory lacks the base's
shards, its index lists them under the names that they must get, and nothing is proven until they are
there: `completion` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.anatomy import Anatomy, SiteRoute
from bake.anatomy.base import Base, open_base
from bake.card.render import write_story
from bake.checkpoint.licences import write_notice
from bake.checkpoint.writer import copy_companions, write_config, write_new_weights
from bake.directions.direction import Direction
from bake.errors import CheckpointError, UnsupportedError
from bake.io.hashing import hash_files
from bake.io.output_files import RESULT_FILE
from bake.io.staging import check_output, staged_directory
from bake.pipeline.completion import NeededShard, describe_needs, unproven
from bake.pipeline.decision import Decision, decide_push, saved_norms
from bake.pipeline.given_directions import hold_against, open_direction
from bake.pipeline.recipe import Recipe
from bake.pipeline.record import describe_bake, describe_left_out, encode_result
from bake.plan.destination import choose_destination
from bake.plan.plan import Plan, make_plan
from bake.plan.undo_record import describe_undo
from bake.sites import Slot
from bake.strength.coefficients import Push
from bake.support.progress import announce
from bake.support.timing import Stopwatch, peak_memory
from bake.sweeps.evidence import read_evidence


@dataclass(frozen=True)
class ThinExport:
    """What a thin export made; `needs` are the base's shards that have to be put beside it."""

    output: Path
    base: Base
    plan: Plan
    decision: Decision
    needs: tuple[NeededShard, ...]
    files: Mapping[str, Mapping[str, Any]]
    equivalence: Mapping[str, Any]
    timings: Mapping[str, float]
    peak_memory: int

    @property
    def push(self) -> Push:
        """How far each layer is pushed along its unit direction."""
        return self.decision.push

    @property
    def direction(self) -> Direction:
        """The direction that was baked."""
        return self.decision.direction

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output),
            **describe_bake(self.base, self.plan, self.decision),
            **describe_needs(self.needs),
            "equivalence": dict(self.equivalence),
            "files": dict(self.files),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }


def export_thin(recipe: Recipe) -> ThinExport:
    """Write what a bake adds to its base, and what is needed to complete it.

    Raises a BakeError that names what is wrong; then nothing is left at the output path.
    """
    recipe.check()
    clock = Stopwatch()
    output = check_output(Path(recipe.output), overwrite=recipe.overwrite)
    direction = open_direction(recipe)
    assert direction is not None  # Recipe.check has seen to it.
    evidence = read_evidence(Path(recipe.sweep)) if recipe.sweep else None
    base = open_base(recipe.model, recipe.revision, clock, headers_only=True)
    direction = hold_against(base, direction, recipe)
    checkpoint = base.checkpoint
    check_output(output, overwrite=recipe.overwrite, base_directory=checkpoint.source)
    check_base(base)
    destination = choose_destination(base.anatomy, recipe.place, direction)
    check_route(base.anatomy, destination.route)
    norms = saved_norms(base, recipe, destination)
    assert norms is not None  # Recipe.check has seen to it.
    hidden_size, multiplier = base.anatomy.hidden_size, float(recipe.multiplier)
    push = decide_push(recipe, destination, hidden_size, direction, norms, multiplier)
    if push.warning:
        announce(push.warning)
    if evidence is not None:
        evidence.check(base.to_dict(), destination.site, push)
    decision = Decision(push, norms, direction, evidence=evidence)
    with clock.stage("plan"):
        plan = make_plan(checkpoint, base.anatomy, destination.route, push)
    equivalence = unproven(rounding_allowed=recipe.allow_rounding)
    with staged_directory(
        output, overwrite=recipe.overwrite, base_directory=checkpoint.source
    ) as staging:
        with clock.stage("write"):
            missing = write_new_weights(checkpoint, plan.edits, staging)
            needs = tuple(NeededShard.of(checkpoint, file) for file in missing)
            write_config(checkpoint, plan.config_changes, staging)
            copy_companions(checkpoint, staging)
            write_notice(base.licence, staging)
        with clock.stage("describe"):
            story = describe_bake(base, plan, decision)
            sources = {shard.name: shard.base_file for shard in needs}
            story["undo"] = describe_undo(checkpoint, plan, sources)
            story |= {**describe_needs(needs), "equivalence": equivalence}
            write_story(staging, story, plan, decision)
            files = hash_files(staging)
            text = encode_result({**story, "files": files})
            (staging / RESULT_FILE).write_text(text, encoding="utf-8")
    for entry in describe_left_out(base, plan):
        announce(entry.describe())
    return ThinExport(
        output, base, plan, decision, needs, files, equivalence, clock.seconds, peak_memory()
    )


def check_base(base: Base) -> None:
    """Raise CheckpointError for a base without safetensors shards that could be put beside it."""
    if base.checkpoint.pickled:
        raise CheckpointError(
            f"{base.checkpoint.model_id} has no safetensors, only pickled weights that bake converts: "
            "leave --thin out."
        )


def check_route(anatomy: Anatomy, route: SiteRoute) -> None:
    """Raise UnsupportedError where the slots are not new, or need weights to be computed."""
    if is_thin(route):
        return
    if route.rewriter is not None:
        reason = f"the weights are rewritten ({route.route}: {route.rewriter.name})"
    elif any(slot.weight for slot in _slots(route)):
        reason = "it is folded through a weight matrix"
    else:
        reason = "its bias exists already, so a base shard has to be patched"
    possible = ", ".join(f"--site {entry.site}" for entry in anatomy.routes if is_thin(entry))
    raise UnsupportedError(
        f"{route.site} of {anatomy.model_type} cannot be baked thin: {reason}; "
        f"thin here: {possible or 'no site'}"
    )


def is_thin(route: SiteRoute) -> bool:
    """Tell whether a route needs no byte of the base: every slot is new and takes the push itself."""
    slots = _slots(route)
    return (
        route.rewriter is None
        and not any(slot.weight for slot in slots)
        and {slot.bias for slot in slots} <= set(route.new_parameters)
    )


def _slots(route: SiteRoute) -> list[Slot]:
    return [slot for slots in route.slots.values() for slot in slots]
