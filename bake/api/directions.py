"""Find a direction, convert one, show what one says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bake.anatomy import Anatomy, examine
from bake.anatomy.base import load_base, open_any
from bake.api.given import GivenPairs, GivenTexts, Model, as_files
from bake.checkpoint.checkpoint import find_bake, open_description
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.directions.extract import OPTIMIZE, ExtractionOptions, check_layers, extract
from bake.directions.first_look import look_first
from bake.directions.formats import conversion, fit_direction, read_direction, understanding
from bake.directions.formats.conversion import ConvertedDirection
from bake.directions.logit_lens import TOKENS, Reading, compare_directions, read_tokens
from bake.directions.optimize import KL_WEIGHT, STEPS
from bake.errors import DirectionError
from bake.io.atomic import check_file, write_file
from bake.io.shipped import find_model
from bake.models.forward import read_config
from bake.models.streaming import choose_placement
from bake.options.documentation import documented
from bake.options.others import CONVERT, DIRECTION, SHOW
from bake.pipeline.recipe import DEFAULT_BAND
from bake.pipeline.record import read_any_result, rebuild_push
from bake.plan.destination import site_to_read
from bake.sites import check_site, layers_with
from bake.strength.coefficients import band_layers, parse_band
from bake.support.processes import is_main
from bake.support.progress import announce
from bake.texts.pairs import identify_pairs, read_pairs


@documented(DIRECTION)
def extract_direction(
    model: Model,
    *,
    pairs: GivenPairs,
    output: str | Path | None = None,
    method: str = "mean",
    token: str | int = "last",
    site: str = "mlp_out",
    layers: int | Sequence[int] | None = None,
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: GivenPairs | None = None,
    seed: int = 0,
    steps: int = STEPS,
    kl_weight: float = KL_WEIGHT,
    neutral: GivenTexts = "neutral",
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Direction:
    """Find one direction per layer from contrast pairs; write them to `output` if it is given.

    How well the direction separates pairs that it was not found from is in its metadata:
    `bake.directions.separation.read_separation(direction)`.
    A model can also be (model, tokenizer), loaded by transformers; pairs a list of tuples (positive,
    negative) or (prompt, positive, negative), of mappings or of `ContrastPair`s.
    """
    with as_files({"pairs": pairs, "held_out": held_out, "neutral": neutral}) as given:
        options = ExtractionOptions(
            method=method,
            token=token,
            chat_template=chat_template,
            held_out=given["held_out"],
            from_layer=from_layer,
            seed=seed,
            steps=steps,
            kl_weight=kl_weight,
            neutral=given["neutral"],
        )
        options.check()
        if site != "auto":
            check_site(site)
        read = read_pairs(given["pairs"])
        placement = choose_placement(device_map, max_memory)
        _check_output(output)
        named = None if layers is None else [layers] if isinstance(layers, int) else list(layers)
        look_first(model, revision, layers=[partial(check_layers, named or ())])
        base = open_any(model, revision)
        site = site_to_read(base.anatomy, site)
        direction = extract(
            load_base(base, placement),
            site,
            read,
            _layers_at(site, base.anatomy, method) if named is None else named,
            options,
            model_name=base.to_dict()["id"],
            named=named is not None,
            origin=identify_pairs(given["pairs"], read),
        )
    if output is not None and is_main():
        write_file(Path(output), direction_bytes(direction))
    return direction


def _check_output(output: str | Path | None) -> None:
    """Raise a BakeError where no direction can be written."""
    if output is None:
        return
    if Path(output).suffix.lower() in conversion.OTHER_TOOLS:
        raise DirectionError(
            f"{output}: a direction is found into a .safetensors file; bake direction convert then "
            "writes other formats"
        )
    check_file(Path(output))


def _layers_at(site: str, anatomy: Anatomy, method: str) -> Sequence[int]:
    """Return the layers that a direction is found in where the user names none."""
    count = anatomy.layer_count
    band = band_layers(count, parse_band(DEFAULT_BAND))
    return layers_with(site, anatomy.structure, band if method == OPTIMIZE else range(count))


@documented(CONVERT, file="direction", direction_site="site")
def convert_direction(
    direction: Any,
    *,
    output: str | Path,
    layer_offset: int | None = None,
    site: str | None = None,
    push: bool = False,
    model_hint: str | None = None,
    layers: int | None = None,
    model: str | None = None,
) -> ConvertedDirection:
    """Write a direction in another tool's format, which the suffix of `output` names.

    A direction can be whatever `export` takes. A GGUF control vector has layers 1 and on, as llama.cpp's.
    """
    if push:
        direction, site = _push_of(direction, site)
    described = None if model is None else open_description(find_model(model))
    anatomy = None if described is None else examine(read_config(described))
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


def _push_of(bake: Any, site: str | None) -> tuple[dict[int, Any], str]:
    """Return what a bake adds, {layer: α·û}, and its site; raise DirectionError for anything else."""
    if not isinstance(bake, str | Path) or site is not None:
        raise DirectionError(
            "--push takes a bake's directory or Hub id, which says the site itself"
        )
    directory = find_bake(find_model(str(bake)))
    recorded = read_any_result(directory)
    if "site" not in recorded:
        raise DirectionError(
            f"{bake} has no push: something was taken out of it, which no vector adds"
        )
    return dict(rebuild_push(recorded, directory).vectors), str(recorded["site"])


@documented(SHOW, file="direction", direction_site="site")
def show_direction(
    direction: Any,
    *,
    model: Model | None = None,
    compare: Sequence[str | Path] = (),
    tokens: int = TOKENS,
    layer_offset: int | None = None,
    site: str | None = None,
    revision: str | None = None,
) -> tuple[Direction, Reading]:
    """Say what a direction raises and lowers in `model`, and its cosines to others.

    A direction, and what it is compared with, can be whatever `export` takes. Raises DirectionError for
    one that does not fit the model.
    """
    if model is not None:
        look_first(model, revision, directions=[direction, *compare])
    given = read_direction(direction, layer_offset=layer_offset, site=site)
    others = {str(path): read_direction(path) for path in compare}
    if model is None:
        for shown in (given, *others.values()):
            for sentence in understanding(shown):
                announce(sentence)
        return given, Reading((), compare_directions(given, others))
    base = open_any(model, revision)
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
    found = read_tokens(load_base(base), given, count=tokens)
    return given, Reading(found, cosines)
