"""Bake, and what is asked before: estimate, inspect, calibrate, sweep, tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy import Anatomy, examine
from bake.anatomy.base import load_base, open_any, take_base
from bake.anatomy.catalogue import CatalogueEntry, examine_all, list_model_types
from bake.api.given import GivenPairs, GivenTexts, Model, as_files, as_options
from bake.checkpoint.checkpoint import open_description
from bake.io.atomic import check_file, write_file
from bake.io.shipped import find_model
from bake.models.forward import read_config
from bake.models.streaming import choose_placement
from bake.options.documentation import documented
from bake.options.export import EXPORT
from bake.options.others import CALIBRATE, INSPECT
from bake.options.sweep import SWEEP
from bake.options.tune import TUNE
from bake.pipeline.estimate import Estimate, estimate_cost
from bake.pipeline.export import Export
from bake.pipeline.export import export as run_export
from bake.pipeline.recipe import make_recipe
from bake.sites import check_site, layers_with
from bake.strength.norms import ActivationNorms, measure_norms
from bake.support.processes import divide, is_main
from bake.support.progress import track
from bake.texts.prompts import identify_prompts, read_prompts

if TYPE_CHECKING:
    from bake.sweeps.results import Trial
    from bake.tuning.result import Tuned


@documented(EXPORT)
def export(
    model: str | Path,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    direction: Any = None,
    orthogonalize: bool = False,
    ablate: Any = None,
    ablate_layer: int | None = None,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    keep_scale: bool = False,
    pairs: GivenPairs | None = None,
    method: str = "mean",
    token: str | int = "last",
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: GivenPairs | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    multiplier: float | str | None = None,
    target_kl: float | None = None,
    law: str = "inverse-sqrt-d",
    coefficients: str | Mapping[int, float] | None = None,
    prompts: GivenTexts = "neutral",
    calibration: str | Path | None = None,
    statistic: str = "mean",
    band: str | tuple[float, float] = "40:90",
    layers: str | int | Sequence[int] | None = None,
    site: str = "auto",
    route: str = "auto",
    slot: str | None = None,
    target: str | None = None,
    convert_site: bool = False,
    shards: str = "copy",
    thin: bool = False,
    dtype: str | None = None,
    allow_rounding: bool = False,
    sweep: str | Path | None = None,
    name: str | None = None,
    description: str | None = None,
    base_id: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    accept_licence: bool = False,
) -> Export:
    """Bake a direction into `model` and write the checkpoint to `output`.

    A direction can also be an object: a `Direction`, a steering-vectors `SteeringVector`, {layer: vector},
    a tensor or an array. Pairs can be a list of tuples (positive, negative) or (prompt, positive,
    negative), of mappings or of `ContrastPair`s, prompts a list of texts, a band shares of the depth such
    as (0.4, 0.9), layers a number or numbers, coefficients {layer: α}.
    Raises a BakeError that names what is wrong; then nothing is left at `output`.
    """
    with as_files(_given(locals())) as options:
        return run_export(make_recipe(options))


@documented(EXPORT)
def estimate(
    model: str | Path,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    direction: Any = None,
    orthogonalize: bool = False,
    ablate: Any = None,
    ablate_layer: int | None = None,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    keep_scale: bool = False,
    pairs: GivenPairs | None = None,
    method: str = "mean",
    token: str | int = "last",
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: GivenPairs | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    multiplier: float | str | None = None,
    target_kl: float | None = None,
    law: str = "inverse-sqrt-d",
    coefficients: str | Mapping[int, float] | None = None,
    prompts: GivenTexts = "neutral",
    calibration: str | Path | None = None,
    statistic: str = "mean",
    band: str | tuple[float, float] = "40:90",
    layers: str | int | Sequence[int] | None = None,
    site: str = "auto",
    route: str = "auto",
    slot: str | None = None,
    target: str | None = None,
    convert_site: bool = False,
    shards: str = "copy",
    thin: bool = False,
    dtype: str | None = None,
    allow_rounding: bool = False,
    sweep: str | Path | None = None,
    name: str | None = None,
    description: str | None = None,
    base_id: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    accept_licence: bool = False,
) -> Estimate:
    """Say what `export` with the same options would cost, from headers alone; writes nothing."""
    with as_files(_given(locals())) as options:
        return estimate_cost(make_recipe(options, without_output=True))


@documented(INSPECT)
def inspect(model: Model, *, revision: str | None = None) -> Anatomy:
    """Say which sites and routes of a model are exact, and why others are not; from its config.

    A model can also be (model, tokenizer), loaded by transformers. An extra layer is tried where `mlp_out`
    has no slot in place: it costs compute, and a second here.
    """
    if isinstance(model, str | Path):
        described = open_description(find_model(str(model)), revision=revision)
        anatomy = examine(read_config(described))
    else:
        anatomy = take_base(model).anatomy
    in_place = any(
        route.site == "mlp_out" and route.route in ("native", "flag") for route in anatomy.routes
    )
    return anatomy if in_place else anatomy.with_insertion()


def inspect_all(
    show: Callable[[Sequence[CatalogueEntry]], None] | None = None,
) -> list[CatalogueEntry]:
    """Say of every architecture of the installed transformers what `inspect` says of a model.

    show: called with each architecture's entries as soon as they are found.
    """
    names = list_model_types()
    found: list[CatalogueEntry] = []
    for _, entries in zip(track(names, "architectures"), examine_all(names), strict=True):
        found += entries
        if show is not None:
            show(entries)
    return found


@documented(CALIBRATE)
def calibrate(
    model: Model,
    *,
    output: str | Path | None = None,
    prompts: GivenTexts = "neutral",
    site: str = "mlp_out",
    statistic: str = "mean",
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> ActivationNorms:
    """Measure the activation norms of every layer at a site; write them to `output` if it is given.

    A model can also be (model, tokenizer), loaded by transformers; prompts a list of texts.
    """
    with as_files({"prompts": prompts}) as given:
        texts = read_prompts(given["prompts"])
        identity = identify_prompts(given["prompts"], texts)
    check_site(site)
    placement = choose_placement(device_map, max_memory)
    if output is not None:
        check_file(Path(output))
    base = open_any(model, revision)
    loaded = load_base(base, placement)
    measured = measure_norms(
        loaded,
        site,
        loaded.batches(divide(texts)),
        layers_with(site, base.anatomy.structure, range(base.anatomy.layer_count)),
        statistic=statistic,
    )
    norms = replace(measured, texts=identity)
    if output is not None and is_main():
        values = {"base": base.to_dict(), **norms.to_dict()}
        write_file(Path(output), (json.dumps(values, indent=2) + "\n").encode())
    return norms


@documented(SWEEP)
def sweep(
    model: Model,
    *,
    direction: Any,
    output: str | Path,
    multipliers: Sequence[float] = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0),
    bands: Sequence[str | tuple[float, float]] = ("40:90",),
    sites: Sequence[str] = ("auto",),
    laws: Sequence[str] = ("inverse-sqrt-d",),
    ablate: Sequence[str] = (),
    strengths: Sequence[float] = (1.0,),
    from_layers: Sequence[int] = (),
    pairs: GivenPairs | None = None,
    chat_template: str = "auto",
    words: str | Path | Iterable[str] | None = None,
    openings: GivenTexts | None = None,
    neutral: GivenTexts | None = None,
    prompts: GivenTexts = "neutral",
    scorer: str | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    question: str | None = None,
    judge_repeats: int = 2,
    instruction: str = "",
    control_seeds: int = 8,
    samples: int = 2,
    new_tokens: int = 40,
    max_fluency: float = 1.5,
    max_kl: float = 1.0,
    last_token: bool = False,
    by_layer: bool = False,
    html: bool = False,
    seed: int = 0,
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Trial:
    """Measure what a direction does at each strength, and what it costs; write report and figures.

    A direction and pairs can be whatever `export` takes, a model also (model, tokenizer), loaded by
    transformers; prompts, neutral and openings lists of texts, words a list of words.
    """
    given = _given(locals())
    from bake.sweeps.options import TrialOptions
    from bake.sweeps.run import sweep as run

    with as_files(given) as options:
        return run(TrialOptions(**{**options, "model": given["model"]}))


@documented(TUNE)
def tune(
    model: str | Path,
    *,
    output: str | Path,
    pairs: str | Path | None = None,
    direction: str | Path | None = None,
    held_out: str | Path | None = None,
    sites: Sequence[str] | None = None,
    methods: Sequence[str] = ("mean", "pca", "probe"),
    tokens: Sequence[str] = ("last", "mean"),
    laws: Sequence[str] = ("inverse-sqrt-d", "flat", "measured"),
    route: str = "auto",
    target_kl: float = 0.7,
    reverse: bool = False,
    ablate: bool = False,
    minutes: float | None = None,
    neutral: str | Path = "neutral",
    prompts: str | Path = "neutral",
    chat_template: str = "auto",
    html: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Tuned:
    """Find where to push: what moves held-out pairs most at one cost; write a recipe and the ranking.

    Model, pairs and texts are files here, or names of what ships: the recipe has to name them.
    """
    options = as_options(locals())
    from bake.tuning.options import TuneOptions
    from bake.tuning.tune import tune as run

    return run(TuneOptions(**options))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a function's options: its arguments, without an output where none was given."""
    return {
        name: str(value) if name == "model" and isinstance(value, Path) else value
        for name, value in options.items()
        if not (name == "output" and value is None)
    }
