"""One load of the model, every arm measured, one account of what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.direction import Direction
from bake.dose_response.arms import Arm
from bake.dose_response.design import Design, make_arms, unit_coefficients
from bake.dose_response.findings import DoseResponse
from bake.dose_response.measurements import (
    Measurements,
    Sampling,
    Scorer,
    Texts,
    measure_neutral,
    measure_pairs,
    measure_rollouts,
)
from bake.dose_response.store import Store, fingerprint_of
from bake.dose_response.summary import summarise
from bake.dose_response.window import find_windows
from bake.model import LoadedModel
from bake.norms import measure_norms
from bake.prompts import encode, make_batches
from bake.sites import LayerStructure

KEPT_SAMPLES = 12  # openings whose continuations the report shows


def measure_sites(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    sites: Sequence[str],
    prompts: Sequence[str],
    layer_count: int,
) -> dict[str, dict[int, float]]:
    """Return {site: {layer: μ_l}} of every layer."""
    batches = make_batches(encode(tokenizer, prompts))
    return {
        site: dict(measure_norms(loaded, structure, site, batches, range(layer_count)).values())
        for site in dict.fromkeys(sites)
    }


def run_sweep(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    direction: Direction,
    design: Design,
    texts: Texts,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    *,
    folder: Path | None = None,
    scorer: Scorer | None = None,
) -> DoseResponse:
    """Measure every arm and summarise. With a folder, what is measured is kept there as it is made.

    norms: from `measure_sites`. A sweep of the same design that was interrupted goes on where it
    stopped.
    """
    arms = make_arms(direction, design, norms, layer_count, loaded.hidden_size)
    store = Store(folder, fingerprint_of(arms, design, texts))
    sampled = [arm for arm in arms if arm.kind != "random"]
    given = loaded, structure, tokenizer
    measured: dict[str, Measurements] = {
        "pairs": store.keep("pairs", lambda: measure_pairs(*given, arms, texts.pairs)),
        "neutral": store.keep("neutral", lambda: measure_neutral(*given, arms, texts.neutral)),
        "rollouts": store.keep(
            "rollouts",
            lambda: measure_rollouts(*given, sampled, texts.openings, design.sampling),
        ),
    }
    points = summarise(arms, measured, tokenizer, texts, design.sampling, scorer)
    first = design.variants[0]
    unit = unit_coefficients(direction, first, norms, layer_count, loaded.hidden_size)
    found = DoseResponse(
        points,
        (),
        dict(norms[first.site]),
        unit,
        design,
        tuple(_collect_samples(sampled, measured["rollouts"], texts, tokenizer, design.sampling)),
    )
    return replace(found, windows=tuple(find_windows(found.curve(), design.bounds)))


def _collect_samples(
    arms: Sequence[Arm],
    rollouts: Measurements,
    texts: Texts,
    tokenizer: Any,
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    for index, opening in enumerate(texts.openings[:KEPT_SAMPLES]):
        written = {
            arm.name: tokenizer.decode(
                rollouts[arm.name]["ids"][index * sampling.samples], skip_special_tokens=True
            )
            for arm in arms
            if arm.name in rollouts
        }
        yield {"opening": opening, "texts": written}
