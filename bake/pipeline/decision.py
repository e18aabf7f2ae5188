"""How far each layer is pushed, and along what: given, saved, or measured on the loaded model.

A direction is given or found from pairs, norms are saved or measured, the multiplier is a number or chosen
by a short sweep. The model is loaded for what is neither given nor saved, and all of it is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from bake.anatomy.base import AnyBase, Base, load_base
from bake.directions.direction import Direction, convert_to_input
from bake.directions.extract import ExtractionOptions
from bake.directions.extract import extract as extract_direction
from bake.errors import BakeError
from bake.hooks import ablated
from bake.io.shipped import tried_on
from bake.models.forward import LanguageModel, SpareModel
from bake.models.streaming import Placement
from bake.pipeline.about import About, describe_about
from bake.pipeline.given_directions import GivenDirection, look_at, read_directions
from bake.pipeline.recipe import Recipe
from bake.plan.ablation import AblationPlan
from bake.plan.destination import Destination
from bake.sites import INPUT_SITES, RESIDUAL_SITES
from bake.strength.coefficients import (
    DEFAULT_LAW,
    EXPLICIT_LAW,
    OWN_LENGTH_LAW,
    Push,
    apply_law,
    compute_push,
)
from bake.strength.norms import ActivationNorms, measure_norms
from bake.strength.saved_norms import read_calibration, read_norms
from bake.support.processes import divide
from bake.support.progress import announce, warn
from bake.support.timing import Stopwatch
from bake.sweeps.auto import BOUNDS, MultiplierChoice, choose_multiplier, read_trial_texts
from bake.sweeps.evidence import Evidence, read_evidence
from bake.sweeps.measured_law import MEASURED_LAW, follow_measured_law
from bake.sweeps.measurements import Texts
from bake.texts.held_out import read_divided
from bake.texts.pairs import ContrastPair, identify_pairs, read_pairs
from bake.texts.prompts import identify_prompts, read_prompts


@dataclass(frozen=True)
class Decision:
    """A push, the norms and the direction that it follows from, and why it is as strong as it is.

    choice: how a short sweep chose the multiplier; None where the user gave it. evidence: the sweep that
    the card shows, if there is one. about: what the card says the model is.
    """

    push: Push
    norms: ActivationNorms
    direction: Direction
    choice: MultiplierChoice | None = None
    evidence: Evidence | None = None
    about: About = field(default_factory=About)


def decide_push(
    recipe: Recipe,
    destination: Destination,
    hidden_size: int,
    direction: Direction,
    norms: ActivationNorms,
) -> Push:
    """Return the push of a recipe at m = 1; by its default law where its own has to be measured."""
    law, given = choose_coefficients(recipe, destination, hidden_size, direction, norms)
    return compute_push(
        norms.values(),
        direction.select(destination.layers, hidden_size),
        hidden_size=hidden_size,
        law=law,
        given=given,
    )


def choose_coefficients(
    recipe: Recipe,
    destination: Destination,
    hidden_size: int,
    direction: Direction,
    norms: ActivationNorms,
) -> tuple[str, Mapping[int, float] | None]:
    """Return a law's name and {layer: α at m = 1}, None where the law alone says that.

    The user's coefficients come first, then the length of vectors that keep theirs, then the law; a sum
    of several unit vectors is pushed in proportion to its length.
    """
    own = direction.own_lengths(destination.layers)
    by_law = DEFAULT_LAW if recipe.law == MEASURED_LAW else recipe.law
    if destination.coefficients is not None:
        law, unit = EXPLICIT_LAW, destination.coefficients
    elif recipe.keep_scale:
        return OWN_LENGTH_LAW, own
    elif direction.parts:
        law, unit = by_law, apply_law(by_law, norms.values(), hidden_size)
    else:
        return by_law, None
    if direction.parts and not recipe.keep_scale:
        unit = {layer: unit[layer] * length for layer, length in own.items()}
    return law, unit


@dataclass(frozen=True)
class Inputs:
    """What a recipe's own files say, read before a model is opened; None for what it leaves out.

    pairs: what a direction is found from. trial_texts: what the multiplier is chosen on and the measured
    law is found on; None where neither is needed, or nothing is there to choose by.
    """

    directions: tuple[GivenDirection, ...]
    pairs: Sequence[ContrastPair]
    evidence: Evidence | None
    prompts: Sequence[str]
    trial_texts: Texts | None


def read_inputs(recipe: Recipe) -> Inputs:
    """Read what a recipe names, so that a mistake in it is told before a model is opened."""
    extraction_options(recipe)
    if recipe.calibration:
        read_calibration(Path(recipe.calibration))
    pairs, trial_texts = read_pairs_and_trial(recipe)
    evidence = read_evidence(Path(recipe.sweep)) if recipe.sweep else None
    prompts = [] if recipe.calibration else read_prompts(recipe.prompts)
    look_at(recipe)
    return Inputs(read_directions(recipe), pairs, evidence, prompts, trial_texts)


def read_pairs_and_trial(recipe: Recipe) -> tuple[Sequence[ContrastPair], Texts | None]:
    """Read the pairs that a direction is found from, and the texts that its strength is chosen on.

    Held-out pairs are those that the recipe names, those that lie beside its pairs, a part of its pairs, or
    those that suit a direction that ships.
    """
    if (recipe.given_multiplier is not None and recipe.law != MEASURED_LAW) or recipe.thin:
        return list(read_pairs(recipe.pairs)) if recipe.pairs is not None else [], None
    held_out = recipe.held_out
    if held_out is None and recipe.asks_for_auto:
        held_out = tried_on(recipe.direction).get("pairs")
    pairs, judged = read_divided(recipe.pairs, held_out)
    if not judged and recipe.law == MEASURED_LAW:
        raise BakeError(
            "--law measured is measured on held-out contrast pairs: name them with --held-out FILE, or "
            "give --pairs with 16 or more"
        )
    if not judged and not recipe.asks_for_auto:
        return pairs, None
    return pairs, read_trial_texts(recipe.direction, judged, recipe.chat_template)


def decide(
    base: Base,
    destination: Destination,
    recipe: Recipe,
    inputs: Inputs,
    given: Direction | None,
    placement: Placement | None,
    clock: Stopwatch,
    ablation: AblationPlan | None = None,
) -> tuple[Decision, SpareModel]:
    """Decide how far each layer is pushed; the model is loaded for what is neither given nor saved.

    ablation: what is taken out first; norms and effects are those of what is left. Returns the decision,
    and the model if it was loaded.
    """
    loaded: LanguageModel | None = None
    saved = saved_norms(base, recipe, destination)
    trial, choice = inputs.trial_texts, None
    if saved is not None and ablation is not None:
        announce("the norms of --calibration are the base's, before anything is taken out")
    if (
        given is not None
        and saved is not None
        and not crosses_norm(given, destination.site)
        and trial is None
    ):
        direction, norms = given, saved
    else:
        with clock.stage("load"):
            loaded = load_base(base, placement)
        site, layers = destination.site, destination.layers
        with clock.stage("direction"):
            direction = find_direction(base, loaded, recipe, site, layers, given, inputs.pairs)
        with clock.stage("calibrate"), _taken_out(loaded, ablation):
            norms = saved or find_norms(loaded, recipe, site, layers, inputs.prompts)
    parallel = placement is not None and placement.parallel  # A share is no model.
    push = decide_push(recipe, destination, base.anatomy.hidden_size, direction, norms)
    if trial is not None:
        assert loaded is not None
        with clock.stage("strength"), _taken_out(loaded, ablation):
            if recipe.law == MEASURED_LAW:
                push = follow_measured_law(loaded, destination.site, push, trial)
            if recipe.given_multiplier is None:
                bounds = replace(BOUNDS, kl=recipe.target_kl or BOUNDS.kl)
                choice = choose_multiplier(
                    loaded, destination.site, push.at, trial, sign=recipe.sign, bounds=bounds
                )
                announce(choice.describe())
    push = push.at(choice.multiplier if choice else recipe.given_multiplier or 1.0)
    if push.warning:
        warn(push.warning)
    if inputs.evidence is not None:
        inputs.evidence.check(base.to_dict(), destination.site, push)
    about = describe_about(recipe, direction)
    decision = Decision(push, norms, direction, choice, inputs.evidence, about)
    return decision, SpareModel(None if parallel else loaded)


def _taken_out(
    loaded: LanguageModel, ablation: AblationPlan | None
) -> AbstractContextManager[None]:
    """Return the context in which a model has lost what is taken out before the push."""
    if ablation is None:
        return nullcontext()
    return ablated(loaded.model, ablation.writes, ablation.ablation, before_push=True)


def find_direction(
    base: AnyBase,
    loaded: LanguageModel,
    recipe: Recipe,
    site: str,
    layers: Sequence[int],
    given: Direction | None,
    pairs: Sequence[ContrastPair],
    *,
    judged: bool = True,
) -> Direction:
    """Return the direction at the site: given, or found from pairs. judged: as for `extract`."""
    direction = given or extract(base, loaded, recipe, pairs, site, layers, judged=judged)
    if crosses_norm(direction, site):
        direction = convert_to_input(direction, loaded, site, layers)
    return direction


def find_norms(
    loaded: LanguageModel,
    recipe: Recipe,
    site: str,
    layers: Sequence[int],
    prompts: Sequence[str],
) -> ActivationNorms:
    """Measure the activation norms of layers at the site, with what names the prompts."""
    batches = loaded.batches(divide(prompts))
    measured = measure_norms(loaded, site, batches, layers, statistic=recipe.statistic)
    return replace(measured, texts=identify_prompts(recipe.prompts, prompts))


def saved_norms(base: AnyBase, recipe: Recipe, destination: Destination) -> ActivationNorms | None:
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
    base: AnyBase,
    loaded: LanguageModel,
    recipe: Recipe,
    pairs: Sequence[ContrastPair],
    site: str,
    layers: Sequence[int],
    *,
    judged: bool = True,
) -> Direction:
    """Find the direction from the recipe's contrast pairs.

    judged: whether it is said how well it separates; else only found, in those of the layers in which the
    texts differ.
    """
    return extract_direction(
        loaded,
        site,
        pairs,
        layers,
        extraction_options(recipe),
        named=judged,
        judged=judged,
        model_name=base.to_dict()["id"],
        origin=identify_pairs(str(recipe.pairs), pairs),
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
