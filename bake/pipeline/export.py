"""The pipeline: recipe in, verified directory out; it reads as docs/architecture.md draws it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake import hub
from bake.anatomy.base import Base, open_base
from bake.card.render import write_card_files
from bake.checkpoint.licences import write_notice
from bake.checkpoint.writer import (
    WrittenWeights,
    check_links,
    copy_companions,
    explain_links,
    write_config,
    write_weights,
)
from bake.directions.direction import Direction
from bake.errors import HubError
from bake.io.hashing import hash_files
from bake.io.output_files import RESULT_FILE
from bake.io.staging import check_output, staged_directory
from bake.models.forward import SpareModel
from bake.models.streaming import Placement, choose_placement
from bake.pipeline.completion import NeededShard, Unproven, describe_needs, find_needs
from bake.pipeline.decision import Decision, decide, read_inputs
from bake.pipeline.given_directions import fit_directions
from bake.pipeline.publishing import check_access, check_rights, publish, publish_directory
from bake.pipeline.recipe import Recipe
from bake.pipeline.record import describe_bake, describe_left_out, encode_result
from bake.pipeline.taken_out import (
    describe_taken_out,
    plan_taken_out,
    read_taken_out,
    write_taken_out,
)
from bake.pipeline.thin import check_base, check_route
from bake.plan.destination import choose_destination
from bake.plan.plan import Changes, Plan, check_ablated_route, make_plan
from bake.plan.undo_record import describe_undo
from bake.proof.equivalence import Equivalence
from bake.proof.plain_process import kept_plain_process
from bake.proof.prove import prove
from bake.strength.coefficients import Push
from bake.support.html import show
from bake.support.processes import is_main, leave_to_main
from bake.support.progress import announce, track_bytes, warn
from bake.support.text import list_numbers
from bake.support.timing import Stopwatch, peak_memory
from bake.sweeps.measured_law import MEASURED_LAW
from bake.texts.tokenizer import keep_tokenizer


@dataclass(frozen=True)
class Export:
    """What an export made. `output` is the directory, everything else is in its bake.json too.

    needs: the base's shards that have to be put beside a thin bake before it can be proven. removed: the
    directions that were taken out before the push.
    """

    output: Path
    base: Base
    plan: Plan
    decision: Decision
    equivalence: Equivalence | Unproven
    files: Mapping[str, Mapping[str, Any]]
    timings: Mapping[str, float]
    peak_memory: int
    needs: tuple[NeededShard, ...] = ()
    publication: hub.Publication | None = None
    removed: tuple[Direction, ...] = ()

    def __repr__(self) -> str:
        return f"<Export: {self.summary}; {self.output}>"

    def _repr_html_(self) -> str:
        proof, push = self.equivalence, self.push
        samples = [(s.opening, s.base, s.baked) for s in getattr(proof, "samples", ())]
        cost = getattr(proof, "cost", None)
        notes = [
            f"layers {list_numbers(each.layer for each in push.layers)}, law {push.law}",
            f"cost on neutral text: KL {cost.kl_mean:.2g} nats, 95th percentile {cost.kl_p95:.2g}"
            if cost
            else "",
            f"written to {self.output}",
        ]
        return show(f"Export: {self.summary}", ("opening", "base", "baked"), samples, notes)

    @property
    def summary(self) -> str:
        """The bake in a few words: the base, where it was pushed and how far, and whether it is proven."""
        state = "not verified"
        if isinstance(self.equivalence, Equivalence):
            state = (
                "equivalent to the hooked model" if self.equivalence.passed else "NOT equivalent"
            )
        name, site = self.base.named()["id"], self.plan.route.site
        return f"{name} at {site}, m = {self.push.multiplier:g}, {state}"

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        accept_licence: bool = False,
    ) -> hub.Publication:
        """Publish the finished directory in one commit, and compare what arrived.

        The options are those of `bake.publish`, with the ecosystem's `private`. Raises HubError.
        """
        return publish_directory(
            self.output,
            repo_id,
            private=private,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            accept_licence=accept_licence,
        )

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
        published = {"publication": self.publication.to_dict()} if self.publication else {}
        return {
            "output": str(self.output),
            **published,
            **describe_bake(self.base, self.plan, self.decision),
            **describe_taken_out(self.plan.ablation, self.removed),
            **describe_needs(self.needs),
            "equivalence": self.equivalence.to_dict(),
            "files": dict(self.files),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }


def export(recipe: Recipe) -> Export:
    """Bake a direction into a checkpoint: measure, decide, write, prove. See `bake export --help`.

    A thin one is decided from config and headers; the base's shards are neither read nor written, and
    so nothing is proven. Under `accelerate launch` only the main process comes back; the others end once
    they have measured their share. Raises a BakeError that names what is wrong; then nothing is left at
    the output path.
    """
    recipe.check()
    clock = Stopwatch(stages_of(recipe))
    output = check_output(Path(recipe.output), overwrite=recipe.overwrite)
    check_access(recipe, clock)
    placement = choose_placement(recipe.device_map, recipe.max_memory)
    inputs = read_inputs(recipe)
    taken_out = read_taken_out(recipe)
    with kept_plain_process(start=placement is None and not recipe.thin and is_main()):
        base = open_for_export(recipe, output, clock)
        given = fit_directions(base, inputs.directions, recipe)
        destination = choose_destination(base.anatomy, recipe.place, given)
        if recipe.thin:
            check_route(base.anatomy, destination.route)
        else:
            base.tokenizer  # noqa: B018  One that cannot be loaded is refused before the work.
        removed, ablation = plan_taken_out(base, taken_out, recipe)
        check_ablated_route(destination.route, ablation)
        decision, spare = decide(
            base, destination, recipe, inputs, given, placement, clock, ablation
        )
        leave_to_main()
        if placement is not None and placement.parallel:
            placement = Placement()  # What is proven is read from disk, by one process.
        with clock.stage("plan"):
            plan = make_plan(
                base.checkpoint,
                base.anatomy,
                destination.route,
                decision.push,
                dtype=recipe.dtype,
                ablation=ablation,
            )
        with staged_directory(
            output, overwrite=recipe.overwrite, base_directory=base.checkpoint.source
        ) as staging:
            written = write(base, plan, staging, "none" if recipe.thin else recipe.shards, clock)
            proof, note = settle(base, plan, decision, staging, recipe, placement, spare, clock)
            needs = find_needs(written)
            undo = describe_undo(
                base.checkpoint, plan, written.sources, tokenizer_changed=note is not None
            )
            record = {
                **describe_bake(base, plan, decision),
                **describe_taken_out(ablation, removed),
                **describe_needs(needs),
                "undo": undo,
                "equivalence": proof.to_dict(),
            }
            write_taken_out(removed, staging)
            files = describe(record, plan, decision, staging, written, clock)
    links = explain_links(base.checkpoint, written, recipe.shards)
    left_out = [entry.describe() for entry in describe_left_out(base, plan)]
    for warning in proof.warnings:
        warn(warning)
    for sentence in filter(None, (note, links, *left_out)):
        announce(sentence)
    publication = publish(output, recipe, clock)
    seconds, memory = clock.seconds, peak_memory()
    return Export(
        *(output, base, plan, decision, proof, files, seconds, memory, needs, publication, removed)
    )


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the stages of an export that the user is told of, in order."""
    if recipe.thin:
        return ("checkpoint", "anatomy", "write", "hash")
    chosen = recipe.given_multiplier is None or recipe.law == MEASURED_LAW
    return (
        *("checkpoint", "anatomy", "load", "direction", "calibrate"),
        *(("strength",) if chosen else ()),
        *("write", "prove", "hash"),
        *(("publish",) if recipe.push_to_hub else ()),
    )


def open_for_export(recipe: Recipe, output: Path, clock: Stopwatch) -> Base:
    """Open the base, and refuse one that this recipe cannot bake, publish or write to this place."""
    base = open_base(recipe.model, recipe.revision, clock, headers_only=recipe.thin)
    base = identify(base, recipe)
    check_rights(base, recipe, clock)
    check_output(output, overwrite=recipe.overwrite, base_directory=base.checkpoint.source)
    if recipe.thin:
        check_base(base)
    check_links(base.checkpoint, recipe.shards)
    return base


def identify(base: Base, recipe: Recipe) -> Base:
    """Return the base with the id on the Hub that the recipe gives it, compared with what is there."""
    if recipe.base_id is None:
        if recipe.push_to_hub and not base.checkpoint.revision:
            announce("the base is a local one, so the card names no base_model: give --base-id ID")
        return base
    if base.checkpoint.revision:
        raise HubError(
            f"--base-id is for a local base; this one is {base.checkpoint.model_id} of the Hub"
        )
    source, files = base.checkpoint.source, base.checkpoint.shards
    if base.checkpoint.pickled:  # Its shards are those that were converted.
        files = tuple(sorted(path.name for path in source.glob("*.bin")))
    return replace(base, on_hub=hub.identify_base(source, files, recipe.base_id))


def settle(
    base: Base,
    plan: Plan,
    decision: Decision,
    staging: Path,
    recipe: Recipe,
    placement: Placement | None,
    spare: SpareModel,
    clock: Stopwatch,
) -> tuple[Equivalence | Unproven, str | None]:
    """Prove what was written, unless it is thin; return the proof and what was done to the tokenizer."""
    if recipe.thin:
        return Unproven(recipe.allow_rounding), None
    with clock.stage("tokenizer"):
        note = keep_tokenizer(base.tokenizer, staging)
    with clock.stage("prove"):
        found = prove(
            base, staging, plan, decision.push, recipe.allow_rounding, placement, spare=spare
        )
        found.raise_if_failed()
    return found, note


def write(
    base: Base, plan: Changes, staging: Path, shards: str, clock: Stopwatch
) -> WrittenWeights:
    """Write weights, config and companions into the staging directory."""
    checkpoint, total = base.checkpoint, 0 if shards == "none" else base.checkpoint.size
    drafts = plan.carries_drafts and shards != "none"
    with clock.stage("write"), track_bytes(total, "writing") as progress:
        written = write_weights(checkpoint, plan.edits, staging, shards=shards, progress=progress)
        write_config(checkpoint, plan.config_changes, staging)
        copy_companions(checkpoint, staging, drafts=drafts)
        write_notice(base.licence, staging)
    return written


def describe(
    record: Mapping[str, Any],
    plan: Plan,
    decision: Decision,
    staging: Path,
    written: WrittenWeights,
    clock: Stopwatch,
) -> Mapping[str, Mapping[str, Any]]:
    """Write direction, figures, card and `bake.json` beside the weights; return every file's hash.

    record: the values of `bake.json`, without its files.
    """
    with clock.stage("describe"):
        write_card_files(staging, record, plan, decision)
    with clock.stage("hash"), track_bytes(written.size, "hashing") as progress:
        files = hash_files(staging, known=written.known_sha256, progress=progress)
    text = encode_result({**record, "files": files})
    (staging / RESULT_FILE).write_text(text, encoding="utf-8")
    return files
