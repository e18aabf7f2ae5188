"""The pipeline: recipe in, verified directory out. Reads top to bottom as the flow in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake import hub
from bake.base import Base, load_base, open_base
from bake.card import draw_figures, render_card, words_for
from bake.checkpoint import open_checkpoint
from bake.coefficients import Push, compute_push
from bake.destination import announce_cost, choose_layers, choose_route
from bake.direction import Direction, convert_to_input, direction_bytes
from bake.equivalence import MAX_TOKENS, Equivalence, prove_equivalence
from bake.evidence import Evidence, read_evidence
from bake.extraction import ExtractionOptions
from bake.extraction import extract as extract_direction
from bake.given_directions import hold_against, lengths_of, open_direction
from bake.hashing import hash_files
from bake.licences import write_notice
from bake.model import LoadedModel, read_config
from bake.norms import ActivationNorms, measure_norms
from bake.pairs import read_pairs
from bake.plan import Plan, make_plan
from bake.progress import announce, track_bytes
from bake.prompts import encode, load_tokenizer, make_batches, position_limit, read_prompts
from bake.recipe import Recipe
from bake.record import CARD_FILE, DIRECTION_FILE, RESULT_FILE, describe_bake, encode_result
from bake.saved_norms import read_norms
from bake.sites import INPUT_SITES, RESIDUAL_SITES
from bake.staging import check_output, staged_directory
from bake.streaming import Placement, choose_placement
from bake.strength import MultiplierChoice, choose_multiplier, read_trial_texts
from bake.timing import Stopwatch, peak_memory
from bake.tokenization import keep_tokenizer
from bake.way_back import describe_undo
from bake.writer import (
    WrittenWeights,
    check_links,
    copy_companions,
    explain_links,
    write_config,
    write_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUIVALENCE_PROMPTS = "equivalence"


@dataclass(frozen=True)
class Export:
    """What an export made. `output` is the directory, everything else is in its bake.json too."""

    output: Path
    base: Base
    push: Push
    plan: Plan
    norms: ActivationNorms
    direction: Direction
    equivalence: Equivalence
    files: Mapping[str, Mapping[str, Any]]
    timings: Mapping[str, float]
    peak_memory: int
    publication: hub.Publication | None = None
    choice: MultiplierChoice | None = None
    evidence: Evidence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        published = {"publication": self.publication.to_dict()} if self.publication else {}
        return {
            "output": str(self.output),
            **published,
            **describe_bake(
                self.base,
                self.push,
                self.plan,
                self.norms,
                self.direction,
                self.choice,
                self.evidence,
            ),
            "equivalence": self.equivalence.to_dict(),
            "files": dict(self.files),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }


def export(recipe: Recipe) -> Export:
    """Bake a direction into a checkpoint: measure, decide, write, prove. See `bake export --help`.

    Raises a BakeError that names what is wrong; then nothing is left at the output path.
    """
    recipe.check()
    clock = Stopwatch()
    output = check_output(Path(recipe.output), overwrite=recipe.overwrite)
    if recipe.push_to_hub:
        with clock.stage("hub"):
            hub.check_access(
                recipe.push_to_hub, private=not recipe.public, create_pr=recipe.create_pr
            )
    placement = choose_placement(recipe.device_map, recipe.max_memory)
    extraction_options(recipe)
    given = open_direction(recipe)
    evidence = read_evidence(Path(recipe.sweep)) if recipe.sweep else None
    prompts = [] if recipe.calibration else read_prompts(recipe.prompts)
    trial_texts = (
        read_trial_texts(recipe.direction, recipe.held_out) if recipe.chooses_multiplier else None
    )
    base = open_base(recipe.model, recipe.revision, clock)
    if recipe.push_to_hub:
        with clock.stage("hub"):
            named = {"base": base.to_dict(), "licence": base.licence}
            hub.check_rights(
                named, recipe.push_to_hub, public=recipe.public, accepted=recipe.accept_licence
            )
    given = given and hold_against(base, given, recipe)
    check_output(output, overwrite=recipe.overwrite, base_directory=base.checkpoint.source)
    check_links(base.checkpoint, recipe.shards)
    route = choose_route(base.anatomy, recipe, given)
    layers, explicit = choose_layers(base.anatomy, recipe, route)
    announce_cost(route, layers)
    if given is not None:
        given.select(layers, base.anatomy.hidden_size)

    saved = saved_norms(base, recipe, route.site, layers)

    tokenizer = load_tokenizer(base.checkpoint.directory)

    def push_at(multiplier: float, direction: Direction, norms: ActivationNorms) -> Push:
        return compute_push(
            norms.values(),
            direction.select(layers, base.anatomy.hidden_size),
            hidden_size=base.anatomy.hidden_size,
            multiplier=multiplier,
            law=recipe.law,
            explicit=explicit,
            **lengths_of(direction, layers, keep_scale=recipe.keep_scale),
        )

    choice = None
    complete = given is not None and saved is not None and not crosses_norm(given, route.site)
    if complete and trial_texts is None:
        assert given is not None
        assert saved is not None
        direction, norms = given, saved  # Nothing to measure, so the model is not loaded.
    else:
        with clock.stage("load"):
            loaded = load_base(base.checkpoint, placement)
        direction, norms = measure(
            base, loaded, recipe, route.site, layers, given, saved, tokenizer, prompts, clock
        )
        if trial_texts is not None:
            with clock.stage("strength"):
                choice = choose_multiplier(
                    loaded,
                    base.anatomy.structure,
                    tokenizer,
                    route.site,
                    lambda m: push_at(m, direction, norms),
                    trial_texts,
                )
            announce(choice.describe())
        del loaded  # The proof loads base and bake by itself.
    push = push_at(float(choice.multiplier if choice else recipe.multiplier), direction, norms)
    if evidence is not None:
        evidence.check(base.to_dict(), route.site, push)
    with clock.stage("plan"):
        plan = make_plan(base.checkpoint, base.anatomy, route, push, dtype=recipe.dtype)

    with staged_directory(
        output, overwrite=recipe.overwrite, base_directory=base.checkpoint.source
    ) as staging:
        written = write(base, plan, staging, recipe.shards, clock)
        with clock.stage("tokenizer"):
            note = keep_tokenizer(tokenizer, staging)
        with clock.stage("prove"):
            equivalence = prove(
                base, staging, plan, push, tokenizer, recipe.allow_rounding, placement
            )
            equivalence.raise_if_failed()
        story = describe_bake(base, push, plan, norms, direction, choice, evidence)
        story["undo"] = describe_undo(
            base.checkpoint, plan, written.sources, tokenizer_changed=note is not None
        )
        story["equivalence"] = equivalence.to_dict()
        with clock.stage("describe"):
            kept = Direction(
                {layer: push.directions[layer] for layer in push.directions},
                route.site,
                direction.metadata,
            )
            (staging / DIRECTION_FILE).write_bytes(direction_bytes(kept))
            draw_figures(staging, push, route.site, direction.metadata, evidence)
            card = render_card({**story, **words_for(plan, direction)})
            (staging / CARD_FILE).write_text(card, encoding="utf-8")
        with clock.stage("hash"), track_bytes(written.size, "hashing") as progress:
            files = hash_files(staging, known=written.known_sha256, progress=progress)
        text = encode_result({**story, "files": files})
        (staging / RESULT_FILE).write_text(text, encoding="utf-8")
    links = explain_links(base.checkpoint, written, recipe.shards)
    for warning in (*equivalence.warnings, note, links):
        if warning:
            announce(warning)
    publication = None
    if recipe.push_to_hub:
        with clock.stage("publish"):
            publication = hub.publish(
                output,
                recipe.push_to_hub,
                private=not recipe.public,
                commit_message=recipe.commit_message,
                create_pr=recipe.create_pr,
                accept_licence=recipe.accept_licence,
            )
    return Export(
        output,
        base,
        push,
        plan,
        norms,
        direction,
        equivalence,
        files,
        clock.seconds,
        peak_memory(),
        publication,
        choice,
        evidence,
    )


def write(base: Base, plan: Plan, staging: Path, shards: str, clock: Stopwatch) -> WrittenWeights:
    """Write weights, config and companions into the staging directory."""
    checkpoint = base.checkpoint
    with clock.stage("write"), track_bytes(checkpoint.size, "writing") as progress:
        written = write_weights(checkpoint, plan.edits, staging, shards=shards, progress=progress)
        write_config(checkpoint, plan.config_changes, staging)
        copy_companions(checkpoint, staging)
        write_notice(base.licence, staging)
    return written


def measure(
    base: Base,
    loaded: LoadedModel,
    recipe: Recipe,
    site: str,
    layers: Sequence[int],
    given: Direction | None,
    saved: ActivationNorms | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    clock: Stopwatch,
) -> tuple[Direction, ActivationNorms]:
    """Find what is neither given nor saved: the direction at the site, the norms."""
    with clock.stage("direction"):
        direction = given or extract(base, loaded, tokenizer, recipe, site, layers)
        if crosses_norm(direction, site):
            direction = convert_to_input(
                direction, loaded.model, base.anatomy.structure, site, layers
            )
    with clock.stage("calibrate"):
        norms = saved or measure_norms(
            loaded,
            base.anatomy.structure,
            site,
            make_batches(encode(tokenizer, prompts, limit=position_limit(loaded.model.config))),
            layers,
            statistic=recipe.statistic,
        )
    return direction, norms


def saved_norms(
    base: Base, recipe: Recipe, site: str, layers: Sequence[int]
) -> ActivationNorms | None:
    """Return the norms of the recipe's calibration file; None where it has none."""
    if recipe.calibration is None:
        return None
    return read_norms(
        Path(recipe.calibration),
        base=base.to_dict(),
        site=site,
        statistic=recipe.statistic,
        hidden_size=base.anatomy.hidden_size,
        layers=layers,
    )


def crosses_norm(direction: Direction, site: str) -> bool:
    """Tell whether a direction of the residual stream is used at a normalised input."""
    return direction.site in RESIDUAL_SITES and site in INPUT_SITES


def extract(
    base: Base,
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    site: str,
    layers: Sequence[int],
) -> Direction:
    """Find the direction from the recipe's contrast pairs."""
    return extract_direction(
        loaded,
        base.anatomy.structure,
        site,
        tokenizer,
        read_pairs(str(recipe.pairs)),
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
        open_checkpoint(str(directory)),
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
