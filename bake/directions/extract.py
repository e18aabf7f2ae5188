"""Contrast pairs in, a direction that says how good it is out: reading, fitting and measuring.

`bake direction` and `bake export --pairs` both come through here, so they find the same direction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.directions.activations import parse_token, read_activations
from bake.directions.direction import SCALE_KEY, Direction, normalise
from bake.directions.fit import METHODS as FITTED_METHODS
from bake.directions.fit import check_method, fit_directions
from bake.directions.optimize import (
    KL_WEIGHT,
    STEPS,
    Optimization,
    check_training,
    optimize_push,
)
from bake.directions.separation import (
    KEY,
    LEAST_PAIRS,
    Separation,
    encode_separation,
    measure_separation,
    rounded,
)
from bake.errors import DirectionError
from bake.io.foreign_json import parse_json
from bake.models.forward import LanguageModel
from bake.models.generation import check_seed
from bake.support.processes import agree
from bake.support.progress import announce, warn
from bake.support.text import list_numbers
from bake.texts.pair_tokens import CHAT_TEMPLATES, describe_template, encode_pairs
from bake.texts.pairs import ContrastPair, leave_out_known, read_pairs
from bake.texts.prompts import encode as encode_texts
from bake.texts.prompts import position_limit, read_prompts

if TYPE_CHECKING:
    import torch

OPTIMIZE, OPTIMIZATION_KEY = "optimize", "optimization"
METHODS = (*FITTED_METHODS, OPTIMIZE)


@dataclass(frozen=True)
class ExtractionOptions:
    """How a direction is found.

    token: "last", "mean", "all" or an index of a completion's tokens. held_out: a pairs file that only
    measures; without one the pairs themselves are divided. from_layer: find one layer's direction and
    use it for all. seed: of folds, halves and bootstrap, and of what optimisation draws. steps,
    kl_weight, neutral: of the method "optimize"; neutral is the prompt set that it should leave alone.
    """

    method: str = "mean"
    token: str | int = "last"
    chat_template: str = "auto"
    held_out: str | None = None
    from_layer: int | None = None
    seed: int = 0
    steps: int = STEPS
    kl_weight: float = KL_WEIGHT
    neutral: str = "neutral"

    def check(self) -> None:
        """Raise a BakeError for a choice or a file that does not exist, before any work starts."""
        check_method(self.method, METHODS)
        parse_token(self.token)
        if self.chat_template not in CHAT_TEMPLATES:
            raise DirectionError(
                f"unknown chat template {self.chat_template!r}; one of {', '.join(CHAT_TEMPLATES)}"
            )
        check_seed(self.seed)
        if self.held_out is not None:
            read_pairs(self.held_out)
        if self.method == OPTIMIZE:
            check_training(self.steps, self.kl_weight)
            read_prompts(self.neutral)


def extract(
    loaded: LanguageModel,
    site: str,
    pairs: Sequence[ContrastPair],
    layers: Sequence[int],
    options: ExtractionOptions | None = None,
    *,
    model_name: str = "",
    named: bool = True,
    judged: bool = True,
    origin: Mapping[str, str] | None = None,
) -> Direction:
    """Find one unit direction per layer and measure how well it separates pairs it was not found from.

    named: whether the user asked for just these layers; else those in which the texts do not differ are
    left out, as the first layer's input is at a last token that is a full stop in all of them.
    judged: whether the separation is measured, which takes longer than finding the direction.

    origin: what `identify_pairs` says of the pairs, for the metadata.
    The separation is in the direction's metadata (see `read_separation`); a direction
    that does not separate is announced. Raises DirectionError for a layer the model does not have, and
    where no direction can be found.
    """
    options = options or ExtractionOptions()
    options.check()
    layers = [options.from_layer] if options.from_layer is not None else list(layers)
    _check_layers(loaded, layers)
    limit = position_limit(loaded.config)
    encode = partial(
        encode_pairs, loaded.tokenizer, chat_template=options.chat_template, limit=limit
    )
    read = partial(read_activations, loaded, site, layers=layers, token=options.token)

    encoded = encode(pairs)
    found = read(encoded)
    alike = [] if named else [layer for layer in layers if not found.differences(layer).any()]
    if alike and len(alike) < len(layers):
        announce(f"left out: layers {list_numbers(alike)}, in which the texts do not differ there")
        layers = [layer for layer in layers if layer not in alike]
        found = found.only(layers)
        read = partial(read, layers=layers)
    held_out = None
    if options.held_out and judged:
        fresh = leave_out_known(read_pairs(options.held_out), pairs, str(options.held_out))
        held_out = read(encode(fresh))
    fit: partial[dict[int, torch.Tensor]] | None = None
    if options.method == OPTIMIZE:
        neutral = encode_texts(loaded.tokenizer, read_prompts(options.neutral), limit=limit)
        optimised = agree(  # Every process descends; rounding may lead them apart.
            optimize_push(
                loaded,
                site,
                encoded,
                found,
                neutral,
                steps=options.steps,
                kl_weight=options.kl_weight,
                seed=options.seed,
            )
        )
        vectors, extra = _describe_optimised(optimised, options)
        # It cannot be found again for every fold: the pairs left out of its training measure it.
        held_out = held_out or found.select(optimised.left_out)
    else:
        fit, extra = partial(fit_directions, method=options.method), {}
        vectors = fit(found)
    separation = None
    if judged:
        separation = measure_separation(
            found, vectors, fit=fit, held_out=held_out, seed=options.seed
        )
        _announce(separation)
    extra |= {**describe_template(loaded.tokenizer, pairs, options.chat_template), **(origin or {})}
    return _describe(vectors, site, options, len(pairs), model_name, separation, extra)


def _describe_optimised(
    optimised: Optimization, options: ExtractionOptions
) -> tuple[dict[int, torch.Tensor], dict[str, str]]:
    """Return the unit vectors of an optimised push, and their lengths and figures as metadata."""
    vectors = {
        layer: normalise(vector, f"the optimised push at layer {layer}")
        for layer, vector in optimised.vectors.items()
    }
    lengths = {
        "all" if options.from_layer is not None else str(layer): round(length, 6)
        for layer, length in optimised.lengths.items()
    }
    return vectors, {
        SCALE_KEY: json.dumps(lengths, separators=(",", ":")),
        OPTIMIZATION_KEY: json.dumps(rounded(optimised.to_dict()), separators=(",", ":")),
    }


def _announce(separation: Separation | None) -> None:
    """Say where a direction does not separate, or where it cannot be known."""
    if separation is None:
        announce(
            f"fewer than {LEAST_PAIRS} pairs cannot say how well a direction separates: give more, or "
            "others with --held-out"
        )
    elif separation.warning:
        warn(separation.warning)


def plain_values(direction: Direction) -> dict[str, Any]:
    """Return a direction's plain values, with what its metadata holds as JSON beside them as values."""
    values = direction.to_dict()
    for key in (KEY, SCALE_KEY, OPTIMIZATION_KEY):
        text = values["metadata"].pop(key, None)
        if text is not None:
            values[key] = parse_json(
                text, f"the direction's {key}", error=DirectionError, kind=None
            )
    return values


def check_layers(layers: Sequence[int], layer_count: int) -> None:
    """Raise DirectionError for a layer that a model of so many layers does not have."""
    wrong = [layer for layer in layers if not 0 <= layer < layer_count]
    if wrong:
        raise DirectionError(
            f"the model has no layer {wrong[0]}; its layers are 0 to {layer_count - 1}"
        )


def _check_layers(loaded: LanguageModel, layers: Sequence[int]) -> None:
    modules: Any = loaded.model.get_submodule(loaded.structure.layers)
    check_layers(layers, len(modules))
    if not layers:
        raise DirectionError("no layer was asked for")


def _describe(
    vectors: Mapping[int, torch.Tensor],
    site: str,
    options: ExtractionOptions,
    pairs: int,
    model_name: str,
    separation: Separation | None,
    extra: Mapping[str, str],
) -> Direction:
    metadata = {
        "method": options.method,
        "token": str(options.token),
        "pairs": str(pairs),
        "model": model_name,
        **extra,
    }
    if options.chat_template != "auto":
        metadata["chat_template"] = options.chat_template
    if separation is not None:
        metadata[KEY] = encode_separation(separation)
    if options.from_layer is None:
        return Direction(dict(vectors.items()), site, metadata)
    metadata["from_layer"] = str(options.from_layer)
    return Direction({None: vectors[options.from_layer]}, site, metadata)
