"""What `bake sweep` is asked for, and what that means: texts, a scorer, a design."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.anatomy import Anatomy
from bake.directions.direction import Direction
from bake.directions.subspace import fit_to_scope
from bake.errors import BakeError, DirectionError, UnsupportedError, UsageError
from bake.io.shipped import OPENINGS, REQUESTS, find_set, shipped_sets, tried_on
from bake.models.generation import check_seed
from bake.plan.destination import check_direction, layers_within
from bake.sites import INPUT_SITES, RESIDUAL_SITES, check_direction_site
from bake.strength.coefficients import LAWS, band_layers, parse_band
from bake.support.progress import announce
from bake.support.text import did_you_mean
from bake.sweeps.design import CONTROL_SEEDS, MULTIPLIERS, AblationVariant, Design, Variant
from bake.sweeps.measurements import Sampling, Scorer, Texts
from bake.sweeps.window import Bounds
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts, read_words
from bake.writes import SCOPES, WriteMap


@dataclass(frozen=True)
class TrialOptions:
    """What `bake sweep` is asked for; names as on the command line."""

    model: Any
    direction: str
    output: str
    multipliers: tuple[float, ...] = MULTIPLIERS
    bands: tuple[str, ...] = ("40:90",)
    sites: tuple[str, ...] = ("auto",)
    laws: tuple[str, ...] = ("inverse-sqrt-d",)
    ablate: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    from_layers: tuple[int, ...] = ()
    pairs: str | None = None
    chat_template: str = "auto"
    words: str | None = None
    openings: str | None = None
    neutral: str | None = None
    prompts: str = "neutral"
    scorer: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    question: str | None = None
    judge_repeats: int = 2
    instruction: str = ""
    control_seeds: int = CONTROL_SEEDS
    samples: int = 2
    new_tokens: int = 40
    max_fluency: float = 1.5
    max_kl: float = 1.0
    last_token: bool = False
    by_layer: bool = False
    html: bool = False
    seed: int = 0
    revision: str | None = None
    device_map: str | None = None
    max_memory: str | None = None


def read_texts(options: TrialOptions) -> Texts:
    """Read what the arms are run on. Raises a BakeError where no held-out pairs are named."""
    known = tried_on(options.direction)
    pairs, words = options.pairs or known.get("pairs"), options.words or known.get("words")
    if pairs is None:
        raise UsageError(
            "a sweep measures the shift on contrast pairs that the direction was not found from: "
            "give them with --pairs FILE"
        )
    read = tuple(read_pairs(pairs))
    if len(read) < 2:
        raise BakeError(f"{pairs} holds one contrast pair; an interval needs two or more")
    listed: frozenset[str] = frozenset()
    if words is not None:
        path = find_set(words, "words")
        if path is None:
            hint = did_you_mean(words, shipped_sets("words"))
            raise BakeError(f"no word list {words!r}{hint or '; give a file with one word a line'}")
        listed = read_words(path)
    return Texts(
        read,
        tuple(read_prompts(options.neutral or known.get("neutral", "neutral"))),
        tuple(read_prompts(options.openings or OPENINGS)),
        listed,
        options.chat_template,
        () if options.openings else tuple(read_prompts(REQUESTS)),
    )


def load_scorer(name: str | None) -> Scorer | None:
    """Import a scorer given as `module:function`, text → number; the current directory is looked in."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BakeError(
            f"--scorer {name}: {error}; give module:function, a function from text to a number"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise BakeError(f"--scorer {name} is not a function from text to a number")

    def score(text: str) -> float:
        try:
            return float(found(text))
        except (
            Exception
        ) as error:  # The user's code may raise anything; it is not bake's traceback.
            raise BakeError(f"--scorer {name} failed on {text[:40]!r}: {error!r}") from error

    return score


def check_numbers(options: TrialOptions) -> None:
    """Raise BakeError for what cannot be swept whatever the model is, before one is opened."""
    if not any(options.multipliers):
        raise BakeError("a sweep needs multipliers other than 0, such as --multipliers -1,1")
    if not all(math.isfinite(multiplier) for multiplier in options.multipliers):
        raise BakeError("--multipliers are finite numbers, such as --multipliers -1,1")
    multipliers = set(options.multipliers)
    if len({f"{m:g}" for m in multipliers}) < len(multipliers):
        raise BakeError("two of --multipliers agree in six digits; leave one of them out")
    if min(options.samples, options.new_tokens) < 1 or options.control_seeds < 0:
        raise BakeError("--samples and --new-tokens are 1 or more, --control-seeds 0 or more")
    if not (options.max_fluency > 0 and options.max_kl > 0):
        raise BakeError("--max-fluency and --max-kl are bounds above 0")
    check_seed(options.seed)
    unknown = next((law for law in options.laws if law not in LAWS), None)
    if unknown:
        raise BakeError(f"unknown law {unknown!r}; the laws are {', '.join(LAWS)}")
    for band in options.bands:
        parse_band(band)
    _check_ablations(options)


def _check_ablations(options: TrialOptions) -> None:
    for scope in options.ablate:
        if scope not in SCOPES:
            raise BakeError(
                f"unknown scope {scope!r}; one of {', '.join(SCOPES)}{did_you_mean(scope, SCOPES)}"
            )
    if not all(math.isfinite(strength) and strength for strength in options.strengths):
        raise BakeError("--strengths are finite numbers other than 0, such as --strengths 0.5,1")
    idle = {
        "--strengths": ("writes", options.strengths != (1.0,)),
        "--from-layer": ("stream", options.from_layers),
    }
    for flag, (scope, given) in idle.items():
        if given and scope not in options.ablate:
            raise BakeError(f"{flag} is for --ablate {scope}; give it, or leave {flag} out")


def make_design(options: TrialOptions, anatomy: Anatomy, direction: Direction) -> Design:
    """Return what is compared: every combination of site, law and band, the first one leading."""
    multipliers = tuple(sorted({m for m in options.multipliers if m}))
    sites = [
        anatomy.choose("auto", found_at=direction.site).site if site == "auto" else site
        for site in options.sites
    ]
    for site in sites:
        if direction.site in RESIDUAL_SITES and site in INPUT_SITES:
            raise DirectionError(
                f"the direction was found at {direction.site} and {site} is a normalised input, another "
                f"space; a sweep converts none: find it there, with bake direction --site {site}"
            )
        check_direction_site(direction.site, site, convert=False)
    variants = [
        Variant(site, law, parse_band(band))
        for site in sites
        for law in options.laws
        for band in options.bands
    ]
    pushed = pushable_layers(anatomy, sites)
    for variant in variants:
        band = band_layers(anatomy.layer_count, variant.band)
        layers = layers_within(band, variant.site, pushed[variant.site])
        check_direction(direction, layers, anatomy)
    if options.last_token:
        variants.append(replace(variants[0], injection="last-token"))
    ablations = tuple(dict.fromkeys(_ablations(options, direction)))
    return Design(
        tuple(dict.fromkeys(variants)),
        multipliers,
        options.control_seeds,
        options.instruction,
        Sampling(options.samples, options.new_tokens, seed=options.seed),
        Bounds(options.max_fluency, options.max_kl),
        ablations,
    )


def _ablations(options: TrialOptions, direction: Direction) -> Iterator[AblationVariant]:
    """Yield what is taken out: of the stream one layer's direction each time, of writes each band's."""
    if "stream" in options.ablate:
        for layer in options.from_layers or (None,):
            chosen = fit_to_scope(direction, "stream", layer).metadata.get("layer")
            one = direction.vectors.keys() == {None}
            yield AblationVariant(from_layer=None if one or chosen is None else int(chosen))
    if "writes" in options.ablate:
        fit_to_scope(direction, "writes", None)
        for band in options.bands:
            for strength in options.strengths:
                yield AblationVariant("writes", strength, parse_band(band))


def find_writes(anatomy: Anatomy, design: Design) -> WriteMap | None:
    """Return what writes to the residual stream; None where nothing is taken out.

    Raises UnsupportedError where the architecture cannot be ablated exactly.
    """
    found = None
    for scope in dict.fromkeys(variant.scope for variant in design.ablations):
        found = anatomy.ablation.choose(scope, anatomy.model_type)
    return found


def pushable_layers(anatomy: Anatomy, sites: Sequence[str]) -> dict[str, Sequence[int]]:
    """Return {site: layers that a bake pushes there}; every layer, announced, where no bake can."""
    found: dict[str, Sequence[int]] = {}
    for site in dict.fromkeys(sites):
        try:
            found[site] = anatomy.choose(site).layers
        except UnsupportedError as error:
            announce(f"{site} is swept with hooks only, no bake can push there: {error}")
            found[site] = range(anatomy.layer_count)
    return found
