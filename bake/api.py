"""The same as the commands, as Python functions: plain values in, frozen dataclasses out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.anatomy import Anatomy, examine
from bake.anatomy.base import load_base, open_base
from bake.anatomy.catalogue import CatalogueEntry, examine_all, list_model_types
from bake.checkpoint.checkpoint import find_bake, is_path, open_description
from bake.directions.direction import Direction, direction_bytes
from bake.directions.extract import OPTIMIZE, ExtractionOptions, extract
from bake.directions.formats import conversion, fit_direction, read_direction, understanding
from bake.directions.formats.conversion import ConvertedDirection
from bake.directions.formats.objects import given_as_file
from bake.directions.logit_lens import TOKENS, Reading, compare_directions, read_tokens
from bake.directions.optimize import KL_WEIGHT, STEPS
from bake.errors import BakeError, DirectionError, EndpointError
from bake.io.atomic import check_file, write_file
from bake.io.shipped import find_model
from bake.lifecycle.verify import Verification
from bake.lifecycle.verify import verify as verify_directory
from bake.models.forward import read_config
from bake.models.streaming import choose_placement
from bake.pipeline import export as pipeline
from bake.pipeline import thin
from bake.pipeline.estimate import Estimate, estimate_cost
from bake.pipeline.recipe import DEFAULT_BAND, make_recipe
from bake.sites import check_site, layers_with
from bake.strength.coefficients import band_layers, parse_band
from bake.strength.norms import ActivationNorms, measure_norms
from bake.support.processes import divide, is_main
from bake.support.progress import announce, track
from bake.texts.pairs import read_pairs
from bake.texts.prompts import batch_prompts, identify_prompts, load_tokenizer, read_prompts

if TYPE_CHECKING:
    from bake.engines.endpoint import EndpointCheck
    from bake.hub import Publication
    from bake.lifecycle.branches import Ladder
    from bake.lifecycle.diff import Difference
    from bake.lifecycle.reproduce import Reproduction
    from bake.lifecycle.rescale import Rescaled, Undone
    from bake.sweeps.results import Trial


def export(model: str, *, output: str | Path, **options: Any) -> pipeline.Export | thin.ThinExport:
    """Bake a direction into `model` and write the checkpoint to `output`.

    options: the fields of `bake.pipeline.recipe.Recipe`, such as direction, pairs, multiplier, band, site.
    direction: a path, `FILE:TENSOR[INDEX]`, or an object: a `Direction`, a steering-vectors
    `SteeringVector`, {layer: vector}, a tensor or an array.
    Raises a BakeError that names what is wrong; then nothing is left at `output`.
    """
    with given_as_file(options.pop("direction", None)) as direction:
        recipe = make_recipe(
            {"model": model, "output": str(output), "direction": direction, **_as_text(options)}
        )
        return thin.export_thin(recipe) if recipe.thin else pipeline.export(recipe)


def estimate(model: str, **options: Any) -> Estimate:
    """Say what `export` with the same options would cost, from headers alone; writes nothing."""
    with given_as_file(options.pop("direction", None)) as direction:
        values = {"model": model, "direction": direction, **_as_text(options)}
        return estimate_cost(make_recipe(values, without_output=True))


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
    tokenizer = load_tokenizer(base.checkpoint.directory)
    loaded = load_base(base.checkpoint, placement)
    measured = measure_norms(
        loaded,
        base.anatomy.structure,
        site,
        batch_prompts(tokenizer, divide(texts), loaded.model.config),
        layers_with(site, base.anatomy.structure, range(base.anatomy.layer_count)),
        statistic=statistic,
    )
    norms = replace(measured, texts=identify_prompts(prompts, texts))
    if output is not None and is_main():
        values = {"base": base.to_dict(), **norms.to_dict()}
        write_file(Path(output), (json.dumps(values, indent=2) + "\n").encode())
    return norms


def extract_direction(
    model: str,
    *,
    pairs: str | Path,
    output: str | Path | None = None,
    method: str = "mean",
    token: str | int = "last",
    site: str = "mlp_out",
    layers: Sequence[int] | None = None,
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: str | Path | None = None,
    seed: int = 0,
    steps: int = STEPS,
    kl_weight: float = KL_WEIGHT,
    neutral: str | Path = "neutral",
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Direction:
    """Find one direction per layer from contrast pairs; write them to `output` if it is given.

    layers: 0-based; None means all of them, and for the method "optimize", which trains them together,
    the default band. The other options are those of `ExtractionOptions`. How well the
    direction separates pairs that it was not found from is in its metadata:
    `bake.directions.separation.read_separation(direction)`.
    """
    options = ExtractionOptions(
        method=method,
        token=token,
        chat_template=chat_template,
        held_out=None if held_out is None else str(held_out),
        from_layer=from_layer,
        seed=seed,
        steps=steps,
        kl_weight=kl_weight,
        neutral=str(neutral),
    )
    options.check()
    check_site(site)
    read = read_pairs(pairs)
    placement = choose_placement(device_map, max_memory)
    if output is not None:
        if Path(output).suffix.lower() in conversion.OTHER_TOOLS:
            raise DirectionError(
                f"{output}: a direction is found into a .safetensors file; bake direction convert then "
                "writes other formats"
            )
        check_file(Path(output))
    base = open_base(model, revision)
    if layers is None:
        band = band_layers(base.anatomy.layer_count, parse_band(DEFAULT_BAND))
        layers = layers_with(
            site,
            base.anatomy.structure,
            band if method == OPTIMIZE else range(base.anatomy.layer_count),
        )
    direction = extract(
        load_base(base.checkpoint, placement),
        base.anatomy.structure,
        site,
        load_tokenizer(base.checkpoint.directory),
        read,
        layers,
        options,
        model_name=base.to_dict()["id"],
    )
    if output is not None:
        write_file(Path(output), direction_bytes(direction))
    return direction


def convert_direction(
    direction: Any,
    *,
    output: str | Path,
    layer_offset: int | None = None,
    site: str | None = None,
    model_hint: str | None = None,
    layers: int | None = None,
    model: str | None = None,
) -> ConvertedDirection:
    """Write a direction in another tool's format, which the suffix of `output` names.

    direction: whatever `export` takes. layers: how many the model has; model: the model itself, whose
    config says so, and the width. A GGUF control vector has layers 1 and on, as llama.cpp's.
    """
    anatomy = inspect(model) if model is not None else None
    converted = conversion.convert(
        direction,
        Path(output),
        layer_offset=layer_offset,
        site=site,
        model_hint=model_hint,
        model_type=anatomy.model_type if anatomy else None,
        layer_count=anatomy.layer_count if anatomy else layers,
        hidden_size=anatomy.hidden_size if anatomy else None,
    )
    for sentence in (f"direction understood as {converted.understood}", *converted.notes):
        announce(sentence)
    write_file(converted.output, converted.content)
    return converted


def show_direction(
    direction: Any,
    *,
    model: str | None = None,
    compare: Sequence[str | Path] = (),
    tokens: int = TOKENS,
    layer_offset: int | None = None,
    site: str | None = None,
    revision: str | None = None,
) -> tuple[Direction, Reading]:
    """Say what a direction raises and lowers in `model`, and its cosines to others.

    direction and others: whatever `export` takes; layer_offset and site correct how `direction` is
    understood. Raises DirectionError for one that does not fit the model.
    """
    given = read_direction(direction, layer_offset=layer_offset, site=site)
    others = {str(path): read_direction(path) for path in compare}
    if model is None:
        for shown in (given, *others.values()):
            for sentence in understanding(shown):
                announce(sentence)
        return given, Reading((), compare_directions(given, others))
    base = open_base(model, revision)
    fit = partial(
        fit_direction,
        hidden_size=base.anatomy.hidden_size,
        layer_count=base.anatomy.layer_count,
    )
    given, notes = fit(given, direction, layer_offset=layer_offset, site=site)
    for path in others:
        others[path], more = fit(others[path], path)
        notes += more
    for note in notes:
        announce(note)
    cosines = compare_directions(given, others)
    loaded = load_base(base.checkpoint)
    tokenizer = load_tokenizer(base.checkpoint.directory)
    found = read_tokens(loaded, base.anatomy.structure, tokenizer, given, count=tokens)
    return given, Reading(found, cosines)


def verify(
    directory: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Verification:
    """Prove a baked directory or Hub id again, from its bake.json and its base.

    A thin or rescaled bake that is here is recorded as proven; a published one is only read.
    """
    placement = choose_placement(device_map, max_memory)
    path = Path(directory)
    if path.is_dir() or is_path(str(directory)):
        return verify_directory(path, base, placement)
    found = find_bake(str(directory), revision)
    published = (str(directory), found.name)
    return verify_directory(found, base, placement, record=False, published=published)


def verify_endpoint(
    url: str, model: str | None, *, directory: str | Path = ".", revision: str | None = None
) -> EndpointCheck:
    """Ask an OpenAI-compatible server for the canary of a bake: baked, base or neither.

    directory: a baked directory, or a Hub id, of which only bake.json is fetched.
    """
    from bake.checkpoint.download import download_record
    from bake.engines.endpoint import check_endpoint
    from bake.pipeline.record import read_canary

    if not model:
        raise EndpointError("--endpoint needs --model NAME, what the server calls the model")
    path = Path(directory)
    if not path.is_dir() and not is_path(str(directory)):
        path = download_record(str(directory), revision)
    return check_endpoint(url, model, read_canary(path))


def sweep(model: str, *, direction: Any, output: str | Path, **options: Any) -> Trial:
    """Measure what a direction does at each strength, and what it costs; write report and figures.

    direction: as for `export`. options: the fields of `TrialOptions`, such as multipliers,
    pairs, words, html.
    """
    from bake.sweeps.options import TrialOptions
    from bake.sweeps.run import sweep

    with given_as_file(direction) as path:
        return sweep(TrialOptions(model=model, direction=str(path), output=str(output), **options))


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    accept_licence: bool = False,
    verify_remote: bool = False,
    strengths: Sequence[float] = (),
    base: str | None = None,
) -> Publication | Ladder:
    """Publish a baked directory to the Hub in one commit, and compare what arrived.

    What the base's repository has already is copied there. revision: a branch, made where there is
    none. create_pr: open a pull request instead of committing. accept_licence: the caller has the right
    to publish where bake cannot see it, see `licences`. verify_remote: download what was published
    and prove it, loaded by its id. strengths: multipliers, each for a branch of its own (m0.5, m1.5),
    proven before they are sent. base: path or Hub id for these proofs; as bake.json names it where it is
    left out.
    """
    from bake import hub

    if strengths and (revision or create_pr or verify_remote):
        raise BakeError(
            "--strengths makes branches of its own, each proven before it is sent: leave --revision, "
            "--create-pr and --verify-remote out"
        )
    if verify_remote and create_pr:
        raise BakeError(
            "--verify-remote is of what was published, not of a pull request: leave one out"
        )
    if base and not (strengths or verify_remote):
        raise BakeError("--base is for the proofs of --strengths and --verify-remote: leave it out")
    options: dict[str, Any] = {
        "private": not public,
        "commit_message": commit_message,
        "accept_licence": accept_licence,
    }
    if strengths:
        from bake.lifecycle.branches import publish_strengths

        return publish_strengths(Path(directory), repo_id, strengths, base=base, **options)
    found = hub.publish(Path(directory), repo_id, revision=revision, create_pr=create_pr, **options)
    if not verify_remote:
        return found
    from bake.lifecycle.published import verify_published

    return verify_published(found, base=base, revision=revision, accept_licence=accept_licence)


def diff(
    base: str | Path,
    baked: str | Path,
    *,
    base_revision: str | None = None,
    revision: str | None = None,
) -> Difference:
    """Say which tensors, config keys and files of two checkpoints differ, and by how much."""
    from bake.lifecycle import diff as compare

    return compare.diff(str(base), str(baked), base_revision=base_revision, revision=revision)


def reproduce(
    model: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    calibrate: str | bool = False,
) -> Reproduction:
    """Build a bake again from its bake.json and its base, and compare every file."""
    from bake.lifecycle import reproduce as reproduction

    return reproduction.reproduce(str(model), base=base, revision=revision, calibrate=calibrate)


def rescale(directory: str | Path, *, multiplier: float) -> Rescaled:
    """Give a baked directory another strength, in place."""
    from bake.lifecycle import rescale as restoration

    return restoration.rescale(Path(directory), multiplier)


def undo(
    model: str | Path, *, output: str | Path, overwrite: bool = False, revision: str | None = None
) -> Undone:
    """Write the base of a bake, from the bake alone."""
    from bake.lifecycle import rescale as restoration

    return restoration.undo(str(model), Path(output), overwrite=overwrite, revision=revision)


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their paths as text, which a recipe holds."""
    paths = ("pairs", "held_out", "prompts", "calibration", "sweep", "output")
    return {k: str(v) if k in paths and v is not None else v for k, v in options.items()}


__all__ = [
    "calibrate",
    "convert_direction",
    "diff",
    "estimate",
    "export",
    "extract_direction",
    "inspect",
    "publish",
    "read_direction",
    "reproduce",
    "rescale",
    "show_direction",
    "sweep",
    "undo",
    "verify",
    "verify_endpoint",
]
