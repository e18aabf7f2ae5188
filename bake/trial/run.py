"""`bake sweep`: a model, a direction and texts → measurements, figures and a page in one directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bake import processes
from bake.base import load_base, open_base
from bake.dose_response import measure_sites, run_sweep
from bake.dose_response.attribution import attribute
from bake.errors import BakeError, OutputError
from bake.formats import fit_direction, read_direction
from bake.progress import announce
from bake.prompts import load_tokenizer, read_prompts
from bake.streaming import choose_placement
from bake.timing import Stopwatch, peak_memory
from bake.trial.files import prepare_directory, write_report
from bake.trial.options import TrialOptions, load_scorer, make_design, read_texts
from bake.trial.results import Trial


def sweep(options: TrialOptions) -> Trial:
    """Run a sweep and write its directory; see `bake sweep --help`.

    The directory keeps what is measured as it is made: the same command again goes on from there.
    Raises a BakeError that names what is wrong.
    """
    if processes.count() > 1:
        raise BakeError("bake sweep runs in one process; start it without accelerate launch")
    clock = Stopwatch()
    texts = read_texts(options)
    scorer = load_scorer(options.scorer)
    given = read_direction(options.direction)
    base = open_base(options.model, options.revision, clock)
    direction, notes = fit_direction(
        given,
        options.direction,
        hidden_size=base.anatomy.hidden_size,
        layer_count=base.anatomy.layer_count,
    )
    for note in notes:
        announce(note)
    design = make_design(options, base.anatomy, direction)
    output = prepare_directory(Path(options.output))
    tokenizer = load_tokenizer(base.checkpoint.directory)
    with clock.stage("load"):
        placement = choose_placement(options.device_map, options.max_memory)
        loaded = load_base(base.checkpoint, placement)
    layer_count = base.anatomy.layer_count
    with clock.stage("calibrate"):
        norms = measure_sites(
            loaded,
            base.anatomy.structure,
            tokenizer,
            [variant.site for variant in design.variants],
            read_prompts(options.prompts),
            layer_count,
        )
    with clock.stage("sweep"):
        found = run_sweep(
            loaded,
            base.anatomy.structure,
            tokenizer,
            direction,
            design,
            texts,
            norms,
            layer_count,
            folder=output,
            scorer=scorer,
        )
    attribution = None
    if options.by_layer:
        with clock.stage("by layer"):
            attribution = attribute(
                loaded,
                base.anatomy.structure,
                tokenizer,
                direction,
                design.variants[0],
                texts,
                norms,
                layer_count,
            )
    trial = Trial(output, base, direction, found, texts, attribution, clock.seconds, peak_memory())
    with clock.stage("report"):
        try:
            write_report(trial, html=options.html)
        except OSError as error:
            raise OutputError(
                f"{output} cannot be written: {error.strerror or error}; what was measured is kept, so "
                f"the same command goes on from there"
            ) from None
    return replace(trial, timings=clock.seconds, peak_memory=peak_memory())
