"""Bake, and what is asked before: estimate, inspect, calibrate, sweep, tune."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy import Anatomy, examine
from bake.anatomy.base import load_base, open_base
from bake.anatomy.catalogue import CatalogueEntry, examine_all, list_model_types
from bake.checkpoint.checkpoint import open_description
from bake.directions.formats.objects import given_as_file
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
    model: str,
    *,
    output: str | Path,
    overwrite: bool = False,
    revision: str | None = None,
    direction: Any = None,
    orthogonalize: bool = False,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    keep_scale: bool = False,
    pairs: str | Path | None = None,
    method: str = "mean",
    token: str | int = "last",
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: str | Path | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    multiplier: float | str | None = None,
    target_kl: float | None = None,
    law: str = "inverse-sqrt-d",
    coefficients: str | None = None,
    prompts: str | Path = "neutral",
    calibration: str | Path | None = None,
    statistic: str = "mean",
    band: str = "40:90",
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
    a tensor or an array.
    Raises a BakeError that names what is wrong; then nothing is left at `output`.
    """
    options = dict(locals())
    with given_as_file(direction) as given:
        return run_export(make_recipe(_as_text({**options, "direction": given})))


@documented(EXPORT)
def estimate(
    model: str,
    *,
    output: str | Path = "",
    overwrite: bool = False,
    revision: str | None = None,
    direction: Any = None,
    orthogonalize: bool = False,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    keep_scale: bool = False,
    pairs: str | Path | None = None,
    method: str = "mean",
    token: str | int = "last",
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: str | Path | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    multiplier: float | str | None = None,
    target_kl: float | None = None,
    law: str = "inverse-sqrt-d",
    coefficients: str | None = None,
    prompts: str | Path = "neutral",
    calibration: str | Path | None = None,
    statistic: str = "mean",
    band: str = "40:90",
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
    device_map: str | None = None,
    max_memory: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    accept_licence: bool = False,
) -> Estimate:
    """Say what `export` with the same options would cost, from headers alone; writes nothing."""
    options = dict(locals())
    with given_as_file(direction) as given:
        values = _as_text({**options, "direction": given})
        return estimate_cost(make_recipe(values, without_output=True))


@documented(INSPECT)
def inspect(model: str, *, revision: str | None = None) -> Anatomy:
    """Say which sites and routes of a model are exact, and why others are not; from its config.

    An extra layer is tried where `mlp_out` has no slot in place: it costs compute, and a second here.
    """
    anatomy = examine(read_config(open_description(find_model(model), revision=revision)))
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
    model: str,
    *,
    output: str | Path | None = None,
    prompts: str | Path = "neutral",
    site: str = "mlp_out",
    statistic: str = "mean",
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> ActivationNorms:
    """Measure the activation norms of every layer at a site; write them to `output` if it is given."""
    check_site(site)
    texts = read_prompts(prompts)
    placement = choose_placement(device_map, max_memory)
    if output is not None:
        check_file(Path(output))
    base = open_base(model, revision)
    loaded = load_base(base, placement)
    measured = measure_norms(
        loaded,
        site,
        loaded.batches(divide(texts)),
        layers_with(site, base.anatomy.structure, range(base.anatomy.layer_count)),
        statistic=statistic,
    )
    norms = replace(measured, texts=identify_prompts(prompts, texts))
    if output is not None and is_main():
        values = {"base": base.to_dict(), **norms.to_dict()}
        write_file(Path(output), (json.dumps(values, indent=2) + "\n").encode())
    return norms


@documented(SWEEP)
def sweep(
    model: str,
    *,
    direction: Any,
    output: str | Path,
    multipliers: Sequence[float] = (-3.0, -2.0, -1.0, 1.0, 2.0, 3.0),
    bands: Sequence[str] = ("40:90",),
    sites: Sequence[str] = ("auto",),
    laws: Sequence[str] = ("inverse-sqrt-d",),
    pairs: str | Path | None = None,
    chat_template: str = "auto",
    words: str | Path | None = None,
    openings: str | Path | None = None,
    neutral: str | Path | None = None,
    prompts: str | Path = "neutral",
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

    A direction can be whatever `export` takes.
    """
    options = _as_text(dict(locals()))
    from bake.sweeps.options import TrialOptions
    from bake.sweeps.run import sweep as run

    with given_as_file(direction) as path:
        return run(TrialOptions(**{**options, "direction": str(path)}))


@documented(TUNE)
def tune(
    model: str,
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
    minutes: float | None = None,
    neutral: str | Path = "neutral",
    prompts: str | Path = "neutral",
    chat_template: str = "auto",
    html: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Tuned:
    """Find where to push: what moves held-out pairs most at one cost; write a recipe and the ranking."""
    options = _as_text(dict(locals()))
    from bake.tuning.options import TuneOptions
    from bake.tuning.tune import tune as run

    return run(TuneOptions(**options))


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their paths as text and their lists as tuples, as the stages hold them."""
    return {
        name: str(value)
        if isinstance(value, Path)
        else tuple(value)
        if isinstance(value, list) and name != "direction"
        else value
        for name, value in options.items()
    }
