"""The same as the commands, as Python functions: plain values in, frozen dataclasses out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake import contrast, pipeline, thin
from bake.anatomy import Anatomy, examine
from bake.checkpoint import open_description
from bake.cost import Estimate, estimate_cost
from bake.direction import Direction, direction_bytes
from bake.errors import OutputError
from bake.formats import conversion, read_direction
from bake.formats.conversion import ConvertedDirection
from bake.formats.objects import given_as_file
from bake.model import read_config
from bake.norms import ActivationNorms, measure_norms
from bake.processes import divide, is_main
from bake.progress import announce
from bake.prompts import encode, load_tokenizer, make_batches, read_prompts
from bake.recipe import make_recipe
from bake.resources import find_model
from bake.streaming import choose_placement
from bake.verification import Verification
from bake.verification import verify as verify_directory

if TYPE_CHECKING:
    from bake.hub import Publication


def export(model: str, *, output: str | Path, **options: Any) -> pipeline.Export | thin.ThinExport:
    """Bake a direction into `model` and write the checkpoint to `output`.

    options: the fields of `bake.recipe.Recipe`, such as direction, pairs, multiplier, band, site.
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
    texts = read_prompts(prompts)
    base = pipeline.open_base(model, revision)
    tokenizer = load_tokenizer(base.checkpoint.directory)
    norms = measure_norms(
        pipeline.load_base(base.checkpoint, choose_placement(device_map, max_memory)),
        base.anatomy.structure,
        site,
        make_batches(encode(tokenizer, divide(texts))),
        range(base.anatomy.layer_count),
        statistic=statistic,
    )
    if output is not None and is_main():
        values = {"base": base.to_dict(), **norms.to_dict()}
        _write_file(Path(output), (json.dumps(values, indent=2) + "\n").encode())
    return norms


def extract_direction(
    model: str,
    *,
    pairs: str | Path,
    output: str | Path | None = None,
    method: str = "mean",
    token: str = "last",
    site: str = "mlp_out",
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Direction:
    """Find one direction per layer from contrast pairs; write them to `output` if it is given."""
    read = contrast.read_pairs(pairs)
    base = pipeline.open_base(model, revision)
    direction = contrast.find_direction(
        pipeline.load_base(base.checkpoint, choose_placement(device_map, max_memory)),
        base.anatomy.structure,
        site,
        load_tokenizer(base.checkpoint.directory),
        read,
        layers if layers is not None else range(base.anatomy.layer_count),
        method=method,
        token=token,
        model_name=base.to_dict()["id"],
    )
    if output is not None:
        _write_file(Path(output), direction_bytes(direction))
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
    _write_file(converted.output, converted.content)
    return converted


def verify(
    directory: str | Path,
    *,
    base: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Verification:
    """Prove a baked directory again, from its bake.json and its base."""
    return verify_directory(Path(directory), base, choose_placement(device_map, max_memory))


def publish(directory: str | Path, repo_id: str, *, public: bool = False) -> Publication:
    """Publish a baked directory to the Hub in one commit, and compare what arrived."""
    from bake import hub

    return hub.publish(Path(directory), repo_id, private=not public)


def _as_text(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their paths as text, which a recipe holds."""
    paths = ("pairs", "prompts", "calibration", "output")
    return {k: str(v) if k in paths and v is not None else v for k, v in options.items()}


def _write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all; raise OutputError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None


__all__ = [
    "calibrate",
    "convert_direction",
    "estimate",
    "export",
    "extract_direction",
    "inspect",
    "publish",
    "read_direction",
    "verify",
]
