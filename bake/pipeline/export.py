"""The pipeline: recipe in, verified directory out. Reads top to bottom as the flow in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake import hub
from bake.anatomy.base import Base, load_base, open_base
from bake.card.render import write_story
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.licences import write_notice
from bake.checkpoint.writer import (
    WrittenWeights,
    check_links,
    copy_companions,
    explain_links,
    write_config,
    write_weights,
)
from bake.directions.direction import Direction, convert_to_input
from bake.directions.extract import ExtractionOptions
from bake.directions.extract import extract as extract_direction
from bake.io.hashing import hash_files
from bake.io.output_files import RESULT_FILE
from bake.io.staging import check_output, staged_directory
from bake.models.forward import LoadedModel, read_config
from bake.models.streaming import Placement, choose_placement
from bake.pipeline.decision import Decision, decide_push
from bake.pipeline.given_directions import hold_against, open_direction
from bake.pipeline.recipe import Recipe
from bake.pipeline.record import carries_drafts, describe_bake, describe_left_out, encode_result
from bake.plan.destination import Destination, choose_destination
from bake.plan.plan import Plan, make_plan
from bake.plan.undo_record import describe_undo
from bake.proof.equivalence import MAX_TOKENS, Equivalence, prove_equivalence
from bake.sites import INPUT_SITES, RESIDUAL_SITES
from bake.strength.coefficients import Push
from bake.strength.norms import ActivationNorms, measure_norms
from bake.strength.saved_norms import read_calibration, read_norms
from bake.support.progress import announce, track_bytes
from bake.support.timing import Stopwatch, peak_memory
from bake.sweeps.auto import choose_multiplier, read_trial_texts
from bake.sweeps.evidence import Evidence, read_evidence
from bake.sweeps.measurements import Texts
from bake.texts.pairs import ContrastPair, read_pairs
from bake.texts.prompts import (
    batch_prompts,
    encode,
    identify_prompts,
    load_tokenizer,
    position_limit,
    read_prompts,
)
from bake.texts.tokenizer import keep_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUIVALENCE_PROMPTS = "equivalence"


@dataclass(frozen=True)
class Export:
    """What an export made. `output` is the directory, everything else is in its bake.json too."""

    output: Path
    base: Base
    plan: Plan
    decision: Decision
    equivalence: Equivalence
    files: Mapping[str, Mapping[str, Any]]
    timings: Mapping[str, float]
    peak_memory: int
    publication: hub.Publication | None = None

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
            "equivalence": self.equivalence.to_dict(),
            "files": dict(self.files),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }


@dataclass(frozen=True)
class Inputs:
    """What a recipe's own files say, read before a model is opened; None for what it leaves out."""

    direction: Direction | None
    pairs: Sequence[ContrastPair]
    evidence: Evidence | None
    prompts: Sequence[str]
    trial_texts: Texts | None


def export(recipe: Recipe) -> Export:
    """Bake a direction into a checkpoint: measure, decide, write, prove. See `bake export --help`.

    Raises a BakeError that names what is wrong; then nothing is left at the output path.
    """
    recipe.check()
    clock = Stopwatch()
    output = check_output(Path(recipe.output), overwrite=recipe.overwrite)
    check_access(recipe, clock)
    placement = choose_placement(recipe.device_map, recipe.max_memory)
    inputs = read_inputs(recipe)
    base = open_base(recipe.model, recipe.revision, clock)
    checkpoint = base.checkpoint
    check_rights(base, recipe, clock)
    given = inputs.direction and hold_against(base, inputs.direction, recipe)
    check_output(output, overwrite=recipe.overwrite, base_directory=checkpoint.source)
    check_links(checkpoint, recipe.shards)
    destination = choose_destination(base.anatomy, recipe.place, given)
    tokenizer = load_tokenizer(checkpoint.directory)
    decision = decide(base, destination, recipe, inputs, given, tokenizer, placement, clock)
    push = decision.push
    with clock.stage("plan"):
        plan = make_plan(checkpoint, base.anatomy, destination.route, push, dtype=recipe.dtype)
    with staged_directory(
        output, overwrite=recipe.overwrite, base_directory=checkpoint.source
    ) as staging:
        written = write(base, plan, staging, recipe.shards, clock)
        with clock.stage("tokenizer"):
            note = keep_tokenizer(tokenizer, staging)
        with clock.stage("prove"):
            equivalence = prove(
                base, staging, plan, push, tokenizer, recipe.allow_rounding, placement
            )
            equivalence.raise_if_failed()
        with clock.stage("describe"):
            story = describe_bake(base, plan, decision)
            story["undo"] = describe_undo(
                checkpoint, plan, written.sources, tokenizer_changed=note is not None
            )
            story["equivalence"] = equivalence.to_dict()
            write_story(staging, story, plan, decision)
        with clock.stage("hash"), track_bytes(written.size, "hashing") as progress:
            files = hash_files(staging, known=written.known_sha256, progress=progress)
        text = encode_result({**story, "files": files})
        (staging / RESULT_FILE).write_text(text, encoding="utf-8")
    links = explain_links(checkpoint, written, recipe.shards)
    left_out = [entry.describe() for entry in describe_left_out(base, plan)]
    for warning in (*equivalence.warnings, note, links, *left_out):
        if warning:
            announce(warning)
    publication = publish(output, recipe, clock)
    return Export(
        output,
        base,
        plan,
        decision,
        equivalence,
        files,
        clock.seconds,
        peak_memory(),
        publication,
    )


def read_inputs(recipe: Recipe) -> Inputs:
    """Read what a recipe names, so that a mistake in it is told before a model is opened."""
    extraction_options(recipe)
    if recipe.calibration:
        read_calibration(Path(recipe.calibration))
    return Inputs(
        direction=open_direction(recipe),
        pairs=read_pairs(recipe.pairs) if recipe.pairs is not None else [],
        evidence=read_evidence(Path(recipe.sweep)) if recipe.sweep else None,
        prompts=[] if recipe.calibration else read_prompts(recipe.prompts),
        trial_texts=read_trial_texts(recipe.direction, recipe.held_out, recipe.chat_template)
        if recipe.chooses_multiplier
        else None,
    )


def check_access(recipe: Recipe, clock: Stopwatch) -> None:
    """Raise HubError where the bake is to be published and this user may not, before any work."""
    if recipe.push_to_hub:
        with clock.stage("hub"):
            hub.check_access(
                recipe.push_to_hub, private=not recipe.public, create_pr=recipe.create_pr
            )


def check_rights(base: Base, recipe: Recipe, clock: Stopwatch) -> None:
    """Raise HubError where the bake is to be published and the base's licence asks for more."""
    if recipe.push_to_hub:
        with clock.stage("hub"):
            named = {"base": base.to_dict(), "licence": base.licence}
            hub.check_rights(
                named, recipe.push_to_hub, public=recipe.public, accepted=recipe.accept_licence
            )


def publish(output: Path, recipe: Recipe, clock: Stopwatch) -> hub.Publication | None:
    """Publish the finished directory where the recipe says so."""
    if recipe.push_to_hub is None:
        return None
    with clock.stage("publish"):
        return hub.publish(
            output,
            recipe.push_to_hub,
            private=not recipe.public,
            commit_message=recipe.commit_message,
            create_pr=recipe.create_pr,
            accept_licence=recipe.accept_licence,
        )


def decide(
    base: Base,
    destination: Destination,
    recipe: Recipe,
    inputs: Inputs,
    given: Direction | None,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement | None,
    clock: Stopwatch,
) -> Decision:
    """Decide how far each layer is pushed; the model is loaded for what is neither given nor saved."""
    saved = saved_norms(base, recipe, destination)

    def push_at(multiplier: float, direction: Direction, norms: ActivationNorms) -> Push:
        return decide_push(
            recipe, destination, base.anatomy.hidden_size, direction, norms, multiplier
        )

    choice = None
    if (
        given is not None
        and saved is not None
        and not crosses_norm(given, destination.site)
        and inputs.trial_texts is None
    ):
        direction, norms = given, saved
    else:
        with clock.stage("load"):
            loaded = load_base(base.checkpoint, placement)
        direction, norms = measure(
            base, loaded, recipe, destination, given, saved, tokenizer, inputs, clock
        )
        if inputs.trial_texts is not None:
            with clock.stage("strength"):
                choice = choose_multiplier(
                    loaded,
                    base.anatomy.structure,
                    tokenizer,
                    destination.site,
                    lambda m: push_at(m, direction, norms),
                    inputs.trial_texts,
                )
            announce(choice.describe())
    push = push_at(float(choice.multiplier if choice else recipe.multiplier), direction, norms)
    if push.warning:
        announce(push.warning)
    if inputs.evidence is not None:
        inputs.evidence.check(base.to_dict(), destination.site, push)
    return Decision(push, norms, direction, choice, inputs.evidence)


def write(base: Base, plan: Plan, staging: Path, shards: str, clock: Stopwatch) -> WrittenWeights:
    """Write weights, config and companions into the staging directory."""
    checkpoint = base.checkpoint
    with clock.stage("write"), track_bytes(checkpoint.size, "writing") as progress:
        written = write_weights(checkpoint, plan.edits, staging, shards=shards, progress=progress)
        write_config(checkpoint, plan.config_changes, staging)
        copy_companions(checkpoint, staging, drafts=carries_drafts(plan))
        write_notice(base.licence, staging)
    return written


def measure(
    base: Base,
    loaded: LoadedModel,
    recipe: Recipe,
    destination: Destination,
    given: Direction | None,
    saved: ActivationNorms | None,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
    clock: Stopwatch,
) -> tuple[Direction, ActivationNorms]:
    """Find what is neither given nor saved: the direction at the site, the norms."""
    site, layers = destination.site, destination.layers
    with clock.stage("direction"):
        direction = given or extract(base, loaded, tokenizer, recipe, inputs.pairs, site, layers)
        if crosses_norm(direction, site):
            direction = convert_to_input(
                direction, loaded.model, base.anatomy.structure, site, layers
            )
    with clock.stage("calibrate"):
        norms = saved or replace(
            measure_norms(
                loaded,
                base.anatomy.structure,
                site,
                batch_prompts(tokenizer, inputs.prompts, loaded.model.config),
                layers,
                statistic=recipe.statistic,
            ),
            texts=identify_prompts(recipe.prompts, inputs.prompts),
        )
    return direction, norms


def saved_norms(base: Base, recipe: Recipe, destination: Destination) -> ActivationNorms | None:
    """Return the norms of the recipe's calibration file; None where it has none."""
    if recipe.calibration is None:
        return None
    return read_norms(
        Path(recipe.calibration),
        base=base.to_dict(),
        site=destination.site,
        statistic=recipe.statistic,
        hidden_size=base.anatomy.hidden_size,
        layers=destination.layers,
    )


def crosses_norm(direction: Direction, site: str) -> bool:
    """Tell whether a direction of the residual stream is used at a normalised input."""
    return direction.site in RESIDUAL_SITES and site in INPUT_SITES


def extract(
    base: Base,
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    pairs: Sequence[ContrastPair],
    site: str,
    layers: Sequence[int],
) -> Direction:
    """Find the direction from the recipe's contrast pairs."""
    return extract_direction(
        loaded,
        base.anatomy.structure,
        site,
        tokenizer,
        pairs,
        layers,
        extraction_options(recipe),
        model_name=base.to_dict()["id"],
    )


def extraction_options(recipe: Recipe) -> ExtractionOptions:
    """Return how the recipe wants its direction found; raise DirectionError for an unknown choice."""
    options = ExtractionOptions(
        method=recipe.method,
        token=recipe.token,
        chat_template=recipe.chat_template,
        held_out=recipe.held_out,
        from_layer=recipe.from_layer,
        seed=recipe.seed,
        steps=recipe.steps,
        kl_weight=recipe.kl_weight,
        neutral=recipe.prompts,
    )
    options.check()
    return options


def prove(
    base: Base,
    directory: Path,
    plan: Plan,
    push: Push,
    tokenizer: PreTrainedTokenizerBase,
    allow_rounding: bool,
    placement: Placement | None = None,
    published: tuple[str, str] | None = None,
) -> Equivalence:
    """Prove that `directory` does what the hooked base does, on the shipped equivalence prompts.

    published: (repository, commit) that the plain process loads by its id.
    """
    return prove_equivalence(
        base.checkpoint,
        open_checkpoint(str(directory), allowed=base.checkpoint.roots),
        base.anatomy.structure,
        plan,
        push,
        tokenizer,
        encode(
            tokenizer,
            read_prompts(EQUIVALENCE_PROMPTS),
            MAX_TOKENS,
            limit=position_limit(read_config(base.checkpoint.directory)),
        ),
        allow_rounding=allow_rounding,
        placement=placement,
        published=published,
    )
