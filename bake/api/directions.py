"""Find a direction, convert one, show what one says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bake.anatomy import examine
from bake.anatomy.base import load_base, open_base
from bake.checkpoint.checkpoint import open_description
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.directions.extract import OPTIMIZE, ExtractionOptions, extract
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
from bake.plan.destination import site_to_read
from bake.sites import check_site, layers_with
from bake.strength.coefficients import band_layers, parse_band
from bake.support.processes import is_main
from bake.support.progress import announce
from bake.texts.pairs import read_pairs


@documented(DIRECTION)
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

    How well the direction separates pairs that it was not found from is in its metadata:
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
    if site != "auto":
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
    site = site_to_read(base.anatomy, site)
    named = layers is not None
    if layers is None:
        band = band_layers(base.anatomy.layer_count, parse_band(DEFAULT_BAND))
        layers = layers_with(
            site,
            base.anatomy.structure,
            band if method == OPTIMIZE else range(base.anatomy.layer_count),
        )
    direction = extract(
        load_base(base, placement),
        site,
        read,
        layers,
        options,
        model_name=base.to_dict()["id"],
        named=named,
    )
    if output is not None and is_main():
        write_file(Path(output), direction_bytes(direction))
    return direction


@documented(CONVERT, file="direction", direction_site="site")
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

    A direction can be whatever `export` takes. A GGUF control vector has layers 1 and on, as llama.cpp's.
    """
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


@documented(SHOW, file="direction", direction_site="site")
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

    A direction, and what it is compared with, can be whatever `export` takes. Raises DirectionError for
    one that does not fit the model.
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
    found = read_tokens(load_base(base), given, count=tokens)
    return given, Reading(found, cosines)
