"""The pipeline: recipe in, verified directory out. Reads top to bottom as the flow in the README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake import __version__, hub
from bake.anatomy import Anatomy, SiteRoute, examine
from bake.anatomy.insertion import Insertion
from bake.card import render_card
from bake.checkpoint import Checkpoint, open_checkpoint
from bake.coefficients import Push, band_layers, compute_push, parse_band, parse_coefficients
from bake.combination import combine, parse_reference
from bake.direction import Direction, convert_to_input, direction_bytes
from bake.engines import describe_survivals, survivals, to_values
from bake.equivalence import MAX_TOKENS, Equivalence, prove_equivalence
from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.evidence import Evidence, read_evidence
from bake.extraction import ExtractionOptions
from bake.extraction import extract as extract_direction
from bake.figures import FIGURES, draw_norms, draw_separation
from bake.formats import fit_direction, read_direction
from bake.hashing import hash_files
from bake.licences import read_licence, write_notice
from bake.loading import auto_class
from bake.model import LoadedModel, load_model, read_config
from bake.norms import ActivationNorms, measure_norms
from bake.pairs import read_pairs
from bake.plan import Plan, make_plan
from bake.progress import announce, track_bytes
from bake.prompts import encode, load_tokenizer, make_batches, position_limit, read_prompts
from bake.quantization import check_quantization
from bake.recipe import Recipe
from bake.resources import DEMO_MODEL, DEMO_NAME, find_model
from bake.saved_norms import read_norms
from bake.separation import parse_separation
from bake.sites import DESCRIPTIONS, INPUT_SITES, RESIDUAL_SITES, check_direction_site
from bake.staging import check_output, staged_directory
from bake.streaming import Placement, choose_placement
from bake.strength import MultiplierChoice, choose_multiplier, read_trial_texts
from bake.timing import Stopwatch, peak_memory
from bake.tokenization import keep_tokenizer
from bake.way_back import describe_undo
from bake.wording import list_numbers
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
METHOD_WORDS = {
    "mean": "the difference of mean activations",
    "pca": "the first principal component of the differences of activations",
    "probe": "a linear probe's weights",
    "optimize": "the push that raises the likelihood of positive over negative completions, optimised",
}
RESULT_FILE, DIRECTION_FILE, CARD_FILE = "bake.json", "direction.safetensors", "README.md"


@dataclass(frozen=True)
class Base:
    """A base that has been opened and examined: what every command starts from."""

    checkpoint: Checkpoint
    anatomy: Anatomy

    def to_dict(self) -> dict[str, Any]:
        """Return what names the base in `bake.json`: never a local path.

        A local base is named by its directory and by a hash of what its headers and config say.
        """
        if self.checkpoint.source.resolve() == DEMO_MODEL.resolve():
            return {"id": DEMO_NAME, "revision": None}
        identity = {"id": self.checkpoint.model_id, "revision": self.checkpoint.revision}
        if self.checkpoint.revision:
            return identity
        return {**identity, "headers_sha256": self.checkpoint.headers_sha256}

    @property
    def licence(self) -> dict[str, Any]:
        """What the base's card says of its licence, see `bake.licences`."""
        return read_licence(self.checkpoint.source, self.checkpoint.companions)


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


def open_base(
    model: str,
    revision: str | None = None,
    clock: Stopwatch | None = None,
    *,
    headers_only: bool = False,
) -> Base:
    """Open a checkpoint and examine its architecture, on headers and the twin alone.

    headers_only: weights that are on the Hub stay there.
    """
    clock = clock or Stopwatch()
    with clock.stage("checkpoint"):
        checkpoint = open_checkpoint(
            find_model(model), revision=revision, headers_only=headers_only
        )
        check_quantization(checkpoint.config, checkpoint.model_id)
    with clock.stage("anatomy"):
        anatomy = examine(read_config(checkpoint.directory))
    return Base(checkpoint, anatomy)


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


def open_direction(recipe: Recipe) -> Direction | None:
    """Read the recipe's direction, if it has one, before anything is fetched for it."""
    if recipe.direction is None:
        return None
    return _join(recipe, [_read_part(recipe, part) for part in _references(recipe)])


def hold_against(base: Base, given: Direction, recipe: Recipe) -> Direction:
    """Hold a given direction against the model, and announce how it was understood."""
    fitted = []
    references = _references(recipe)
    for reference in references:
        direction, notes = fit_direction(
            _read_part(recipe, reference) if recipe.added else given,
            reference[0],
            hidden_size=base.anatomy.hidden_size,
            layer_count=base.anatomy.layer_count,
            layer_offset=recipe.layer_offset,
            site=recipe.direction_site,
        )
        fitted.append(direction)
        for note in notes:
            announce(note)
    return _join(recipe, fitted)


def _references(recipe: Recipe) -> list[tuple[Any, float]]:
    """Return (reference, strength) of the recipe's directions; one alone has no strength but m."""
    if not recipe.added:
        return [(recipe.direction, 1.0)]
    return [parse_reference(str(text)) for text in (recipe.direction, *recipe.added)]


def _read_part(recipe: Recipe, part: tuple[Any, float]) -> Direction:
    return read_direction(part[0], layer_offset=recipe.layer_offset, site=recipe.direction_site)


def _join(recipe: Recipe, directions: Sequence[Direction]) -> Direction:
    """Return the one direction, or the sum of several."""
    if not recipe.added:
        return directions[0]
    named = [
        (Path(str(reference)).stem, strength, direction)
        for (reference, strength), direction in zip(_references(recipe), directions, strict=True)
    ]
    return combine(named, orthogonalize=recipe.orthogonalize, keep_scale=recipe.keep_scale)


def lengths_of(
    direction: Direction, layers: Sequence[int], *, keep_scale: bool
) -> dict[str, dict[int, float]]:
    """Return what `compute_push` is told of a direction's length: nothing of a single unit vector."""
    if keep_scale:
        return {"lengths": direction.own_lengths(layers)}
    return {"scales": direction.own_lengths(layers)} if direction.parts else {}


def write(base: Base, plan: Plan, staging: Path, shards: str, clock: Stopwatch) -> WrittenWeights:
    """Write weights, config and companions into the staging directory."""
    checkpoint = base.checkpoint
    with clock.stage("write"), track_bytes(checkpoint.size, "writing") as progress:
        written = write_weights(checkpoint, plan.edits, staging, shards=shards, progress=progress)
        write_config(checkpoint, plan.config_changes, staging)
        copy_companions(checkpoint, staging)
        write_notice(base.licence, staging)
    return written


def choose_route(anatomy: Anatomy, recipe: Recipe, given: Direction | None) -> SiteRoute:
    """Choose the site's route; announce it where the user left it open, and where it survives."""
    found_at = given.site if given else None
    route = anatomy.choose(
        recipe.site,
        kind=recipe.slot,
        found_at=found_at,
        target=recipe.target,
        route=recipe.route,
    )
    if recipe.site == "auto" or (recipe.route == "auto" and route.rewriter is not None):
        announce(f"site {route.site}: {route.describe()}")
    announce(describe_survivals(anatomy.survivals(route)))
    if found_at is not None:
        note = check_direction_site(found_at, route.site, convert=recipe.convert_site)
        if note:
            announce(note)
    return route


def announce_cost(route: SiteRoute, layers: Sequence[int]) -> None:
    """Say what a route costs that makes the model larger, before anything is done."""
    if isinstance(route.rewriter, Insertion):
        announce(route.rewriter.describe_cost(len(layers)))


def choose_layers(
    anatomy: Anatomy, recipe: Recipe, route: SiteRoute
) -> tuple[Sequence[int], dict[int, float] | None]:
    """Return the pushed layers and, where the user gave them, their coefficients at m = 1.

    Layers of the band that the route cannot push are left out, and announced; a layer that the user
    named is refused. Raises BakeError.
    """
    if recipe.coefficients is None:
        return _within_route(band_layers(anatomy.layer_count, parse_band(recipe.band)), route), None
    explicit = parse_coefficients(recipe.coefficients)
    beyond = [layer for layer in explicit if not 0 <= layer < anatomy.layer_count]
    if beyond:
        raise BakeError(
            f"the coefficients name layer {beyond[0]}; the model has layers 0 to "
            f"{anatomy.layer_count - 1}"
        )
    unable = sorted(explicit.keys() - set(route.layers))
    if unable:
        raise UnsupportedError(
            f"the coefficients name layer {unable[0]}, which cannot take a push at {route.site}; "
            f"layers that can: {list_numbers(route.layers)}"
        )
    return sorted(explicit), explicit


def _within_route(band: range, route: SiteRoute) -> Sequence[int]:
    """Return the layers of a band that the route can push; announce those that it cannot."""
    able = [layer for layer in band if layer in route.layers]
    if len(able) == len(band):
        return band
    if not able:
        raise UnsupportedError(
            f"no layer of the band ({list_numbers(band)}) can take a push at {route.site}; "
            f"layers that can: {list_numbers(route.layers)}; choose a --band that holds some"
        )
    unable = [layer for layer in band if layer not in route.layers]
    announce(
        f"{route.site} is exact in layers {list_numbers(able)} of the band; "
        f"layers {list_numbers(unable)} cannot take a push there and are left as they are"
    )
    return able


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


def load_base(checkpoint: Checkpoint, placement: Placement | None = None) -> LoadedModel:
    """Load the base; refuse one whose weights are incomplete, which transformers fills at random."""
    loaded = load_model(checkpoint.directory, placement=placement)
    missing = loaded.report["missing_keys"] + loaded.report["mismatched_keys"]
    if missing:
        raise CheckpointError(
            f"{checkpoint.model_id} lacks weights that its architecture needs ({missing[0]}); "
            f"transformers would fill them at random, so it cannot be measured"
        )
    return loaded


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


def describe_bake(
    base: Base,
    push: Push,
    plan: Plan,
    norms: ActivationNorms,
    direction: Direction,
    choice: MultiplierChoice | None = None,
    evidence: Evidence | None = None,
) -> dict[str, Any]:
    """Return the part of `bake.json` that says what was done; plain values, no times, no paths."""
    route = plan.route
    added = {"added_layers": count_added_layers(plan)} if count_added_layers(plan) else {}
    return {
        "version": 1,
        "bake_version": __version__,
        "base": base.to_dict(),
        "licence": base.licence,
        "architecture": base.anatomy.architecture,
        "auto_class": auto_class(base.anatomy.config).__name__,
        "layer_count": base.anatomy.layer_count,
        **added,
        "site": route.site,
        "route": route.route,
        "slot": route.to_dict(),
        **push.to_dict(),
        **({"multiplier_choice": choice.to_dict()} if choice else {}),
        **({"sweep": evidence.summarise(push.multiplier)} if evidence else {}),
        "calibration": norms.to_dict(),
        "direction": direction.to_dict(),
        **({"directions": [part.to_dict() for part in direction.parts]} if direction.parts else {}),
        "plan": plan.to_dict(),
        "survives": to_values(survivals(plan.outline(base.anatomy.model_type))),
    }


def count_added_layers(plan: Plan) -> int:
    """Return how many decoder layers the output has beyond its base's."""
    inserts = isinstance(plan.route.rewriter, Insertion)
    return len({edit.layer for edit in plan.slot_edits}) if inserts else 0


def draw_figures(
    directory: Path,
    push: Push,
    site: str,
    metadata: Mapping[str, str],
    evidence: Evidence | None = None,
) -> None:
    """Write `figures/`: the norms with the coefficients, how well the direction separates where its
    metadata knows, and a sweep's where one is given.
    """
    draw_norms(
        directory / FIGURES / "norms.png",
        {entry.layer: entry.activation_norm for entry in push.layers},
        {entry.layer: entry.coefficient for entry in push.layers},
        site,
        push.multiplier,
    )
    separation = parse_separation(metadata)
    if separation is not None:
        accuracy = {entry.layer: (entry.accuracy, *entry.interval) for entry in separation.layers}
        draw_separation(directory / FIGURES / "separation.png", accuracy)
    if evidence is not None:
        evidence.copy_figures(directory)


def card_words(
    site: str,
    slots: str,
    plan: Mapping[str, Any],
    direction: Mapping[str, Any],
    added_layers: int = 0,
) -> dict[str, Any]:
    """Return the phrases that the card needs beside the values of `bake.json`."""
    known = direction["metadata"]
    story = f"found at {direction['site']}"
    how = METHOD_WORDS.get(known.get("method", ""))
    if how is not None:
        story += (
            f" as {how} over {known.get('pairs', '?')} contrast pairs "
            f"(token position: {known.get('token', '?')})"
        )
    if known.get("method") == "sum":
        story += f": the sum {known['parts']}"
    if "understood" in known:
        story += f"; read from another tool's file: {known['understood']}"
    return {
        "site_description": DESCRIPTIONS[site],
        "slots": slots,
        "separation": parse_separation(direction["metadata"]),
        "added_layers": added_layers,
        "config_changes": plan["config_changes"],
        "config_removed": plan.get("config_removed", []),
        "direction_story": story,
    }


def words_for(plan: Plan, direction: Direction) -> dict[str, Any]:
    """Return the card's phrases for a bake that is being made."""
    route = plan.route
    return card_words(
        route.site,
        route.describe(),
        plan.to_dict(),
        direction.to_dict(),
        count_added_layers(plan),
    )


def encode_result(result: Mapping[str, Any]) -> str:
    """Return `bake.json`'s text: the same result always gives the same bytes."""
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"
