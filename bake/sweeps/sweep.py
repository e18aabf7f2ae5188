"""One load of the model, every arm measured, one account of what was found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bake.directions.direction import Direction
from bake.models.forward import LanguageModel
from bake.strength.norms import measure_norms
from bake.support.processes import divide
from bake.support.progress import warn
from bake.sweeps.arms import Arm
from bake.sweeps.design import Design, compute_variant_push, make_arms
from bake.sweeps.findings import DoseResponse
from bake.sweeps.judge import Judge, ask_judge, measure_agreement
from bake.sweeps.measurements import (
    Each,
    Measurements,
    Sampling,
    Scorer,
    Texts,
    measure_each,
    measure_neutral,
    measure_pairs,
    measure_rollouts,
)
from bake.sweeps.summary import summarise
from bake.sweeps.window import find_windows
from bake.texts.protocols import Tokenizer
from bake.writes import WriteMap

KEPT_SAMPLES = 12  # openings whose continuations the report shows


def measure_sites(
    loaded: LanguageModel,
    sites: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    keep: Callable[[str, Callable[[], Any]], Any] = lambda _stage, measure: measure(),
) -> dict[str, dict[int, float]]:
    """Return {site: {layer: μ_l}}. sites: the layers that can be pushed at each site.

    keep: returns what was measured before, or what the function that it is given measures, such as
    `Store.keep`.
    """

    def measure() -> dict[str, dict[int, float]]:
        batches = loaded.batches(divide(prompts))
        return {
            site: measure_norms(loaded, site, batches, layers).values()
            for site, layers in sites.items()
        }

    norms = keep("norms", measure)
    # JSON knows no other keys than text.
    return {site: {int(k): value for k, value in norms[site].items()} for site in sites}


def run_sweep(
    loaded: LanguageModel,
    direction: Direction,
    design: Design,
    texts: Texts,
    norms: Mapping[str, Mapping[int, float]],
    layer_count: int,
    *,
    writes: WriteMap | None = None,
    each: Callable[[str], Each] = lambda _stage: measure_each,
    scorer: Scorer | None = None,
    judge: Judge | None = None,
) -> Iterator[DoseResponse]:
    """Measure every arm; yield what was found after each of the measurements.

    norms: from `measure_sites`. writes: what writes to the stream, where something is taken out. each:
    stage → what measures its texts, such as `Store.each`.
    """
    arms = make_arms(direction, design, norms, layer_count, loaded.hidden_size, writes)
    # Of the random directions those that chance is read from.
    compared = min(map(abs, design.multipliers), key=lambda size: abs(size - 1))
    sampled = [
        arm
        for arm in arms
        if not arm.is_control or (arm.kind == "random" and arm.multiplier == compared)
    ]
    first = design.variants[0]
    push = compute_variant_push(direction, first, norms, layer_count, loaded.hidden_size)
    strongest = push.at(max(design.multipliers, key=abs))
    if strongest.warning:
        warn(strongest.warning)
    measured: dict[str, Measurements] = {}

    def account() -> DoseResponse:
        points = summarise(arms, measured, loaded.tokenizer, texts, design.sampling, scorer)
        shown = [arm for arm in sampled if not arm.is_control]
        samples = _collect_samples(shown, measured, texts, loaded.tokenizer, design.sampling)
        found = DoseResponse(
            points,
            (),
            dict(norms[first.site]),
            {entry.layer: entry.coefficient for entry in push.layers},
            design,
            tuple(samples),
            judge,
            measure_agreement(measured["judge"]) if "judge" in measured else None,
        )
        return replace(found, windows=tuple(find_windows(found.curve(), design.bounds)))

    measured["pairs"] = measure_pairs(
        loaded, arms, texts.pairs, each("pairs"), chat_template=texts.chat_template
    )
    yield account()
    chat_template = texts.chat_template
    measured["neutral"] = measure_neutral(
        loaded, arms, texts.neutral, each("neutral"), chat_template=chat_template
    )
    yield account()
    measured["rollouts"] = measure_rollouts(
        loaded,
        sampled,
        texts.openings,
        design.sampling,
        each("rollouts"),
        chat_template=chat_template,
    )
    yield account()
    if judge is not None:
        asked = hashlib.sha256(json.dumps(judge.to_dict()).encode()).hexdigest()[:16]
        samples, stage = design.sampling.samples, each(f"judge {asked}")
        measured["judge"] = ask_judge(judge, measured["rollouts"], samples, loaded.tokenizer, stage)
        yield account()


def _collect_samples(
    arms: Sequence[Arm],
    measured: Mapping[str, Measurements],
    texts: Texts,
    tokenizer: Tokenizer,
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    rollouts = measured.get("rollouts")
    if rollouts is None:
        return
    for index, opening in enumerate(texts.openings[:KEPT_SAMPLES]):
        written = {
            arm.name: tokenizer.decode(
                rollouts[arm.name]["ids"][index * sampling.samples], skip_special_tokens=True
            )
            for arm in arms
        }
        yield {"opening": opening, "texts": written}
