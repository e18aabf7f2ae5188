"""`bake sweep`: a model, a direction and texts → measurements, figures and a page in one directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

from bake.anatomy.base import AnyBase, load_base, open_any
from bake.directions.direction import Direction
from bake.directions.first_look import look_first
from bake.directions.formats import fit_direction, read_direction
from bake.io.concepts import name_of
from bake.io.shipped import tried_on
from bake.models.streaming import choose_placement
from bake.options.declaration import write_command
from bake.options.sweep import SWEEP
from bake.strength.coefficients import band_layers, parse_band
from bake.support.processes import on_main
from bake.support.progress import announce
from bake.support.timing import Stopwatch, peak_memory
from bake.sweeps.attribution import attribute
from bake.sweeps.design import Design
from bake.sweeps.files import check_place, prepare_directory, write_pictures, write_report
from bake.sweeps.judge import make_judge
from bake.sweeps.measurements import Texts
from bake.sweeps.options import (
    TrialOptions,
    check_numbers,
    find_writes,
    load_scorer,
    make_design,
    pushable_layers,
    read_texts,
)
from bake.sweeps.results import Names, Trial
from bake.sweeps.store import Store
from bake.sweeps.sweep import measure_sites, run_sweep
from bake.sweeps.window import Bounds
from bake.texts.pair_tokens import describe_template
from bake.texts.prompts import read_prompts
from bake.version import __version__


def sweep(options: TrialOptions) -> Trial:
    """Run a sweep and write its directory; see `bake sweep --help`.

    The directory keeps what is measured as it is made: the same command again goes on from there.
    Raises a BakeError that names what is wrong.
    """
    named = ("checkpoint", "anatomy", "load", "calibrate", "sweep")
    clock = Stopwatch((*named, *(("by layer",) if options.by_layer else ()), "report"))
    check_numbers(options)
    texts = read_texts(options)
    prompts = read_prompts(options.prompts)
    placement = choose_placement(options.device_map, options.max_memory)
    scorer = load_scorer(options.scorer)
    judge = make_judge(options.judge, options.judge_model, options.question, options.judge_repeats)
    check_place(Path(options.output))
    look_first(
        options.model,
        options.revision,
        directions=[options.direction],
        layers=[partial(band_layers, band=parse_band(band)) for band in options.bands],
    )
    file = read_direction(options.direction)
    base = open_any(options.model, options.revision, clock)
    direction, notes = fit_direction(
        file,
        options.direction,
        hidden_size=base.anatomy.hidden_size,
        layer_count=base.anatomy.layer_count,
    )
    for note in notes:
        announce(note)
    texts = texts.suited_to(base.tokenizer)
    design = make_design(options, base.anatomy, direction)
    writes = find_writes(base.anatomy, design)
    output = on_main(lambda: prepare_directory(Path(options.output)))
    with Store(output, fingerprint_of(base, direction, design, texts, prompts)) as store:
        names = name_what_is_tried(options)
        template = describe_template(base.tokenizer, texts.pairs, texts.chat_template)
        with clock.stage("load"):
            loaded = load_base(base, placement)
        layer_count = base.anatomy.layer_count
        with clock.stage("calibrate"):
            sites = pushable_layers(base.anatomy, [variant.site for variant in design.variants])
            norms = measure_sites(loaded, sites, prompts, store.keep)
        with clock.stage("sweep"):
            swept = run_sweep(
                loaded,
                direction,
                design,
                texts,
                norms,
                layer_count,
                writes=writes,
                each=store.each,
                scorer=scorer,
                judge=judge,
            )
            for found in swept:
                trial = Trial(output, base, direction, found, texts, template, names=names)
                on_main(partial(write_report, trial, complete=False))
        if options.by_layer:
            with clock.stage("by layer"):
                attribution = attribute(
                    loaded,
                    direction,
                    design.variants[0],
                    texts,
                    norms,
                    layer_count,
                    each=store.each,
                )
            trial = replace(trial, attribution=attribution)
        with clock.stage("report"):
            on_main(lambda: write_pictures(trial, html=options.html))
            on_main(lambda: write_report(trial, complete=True))
    return replace(trial, timings=clock.seconds, peak_memory=peak_memory())


def name_what_is_tried(options: TrialOptions) -> Names:
    """Return what the page calls direction, pairs and command, without a path."""
    pairs = options.pairs or tried_on(options.direction).get("pairs", "pairs")
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    return Names(name_of(options.direction), name_of(pairs), write_command(SWEEP, values))


def fingerprint_of(
    base: AnyBase, direction: Direction, design: Design, texts: Texts, prompts: Sequence[str]
) -> str:
    """Return a hash of everything that decides what is measured.

    Words, a scorer and bounds are not in it: they judge what was measured. A local model is known by its
    files' sizes and times.
    """
    values = {
        "bake": __version__,
        "log": 3,  # Its lines have numbers, and conversations are run as such.
        "base": base.to_dict(),
        "files": base.stat_files(),
        "direction": {str(layer): vector.tolist() for layer, vector in direction.vectors.items()},
        "design": asdict(replace(design, bounds=Bounds())),
        "texts": [[asdict(pair) for pair in texts.pairs], texts.neutral, texts.openings],
        "chat template": texts.chat_template,
        "prompts": list(prompts),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
