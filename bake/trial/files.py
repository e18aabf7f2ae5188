"""The directory of a sweep: report.json, figures, and a page where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

from bake.dose_response.store import MEASUREMENTS_FILE, REPORT_FILE
from bake.errors import OutputError
from bake.figures import FIGURES, draw_dose_response, draw_norms
from bake.trial.page import render_page
from bake.trial.results import Trial

PAGE_FILE = "index.html"


def prepare_directory(output: Path) -> Path:
    """Make the directory; one that holds something else than a sweep is left alone."""
    partial = Path(MEASUREMENTS_FILE).with_suffix(".partial").name
    known = {MEASUREMENTS_FILE, partial, REPORT_FILE, PAGE_FILE, FIGURES}
    try:
        if output.is_dir():
            strange = sorted({entry.name for entry in output.iterdir()} - known)
            if strange:
                raise OutputError(
                    f"{output} holds {strange[0]}, which is no sweep's: give another --output"
                )
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be made: {error.strerror or error}") from None
    return output


def write_report(trial: Trial, *, html: bool) -> None:
    """Write report.json, the figures, and the page where it is asked for."""
    figures = trial.output / FIGURES
    first = trial.found.design.variants[0]
    draw_norms(figures / "norms.png", trial.found.norms, trial.found.coefficients, first.site)
    draw_dose_response(figures / "dose-response.png", trial.found)
    if trial.attribution is not None:
        trial.attribution.draw(figures / "layers.png")
    text = json.dumps(trial.report(), indent=2, ensure_ascii=False) + "\n"
    (trial.output / REPORT_FILE).write_text(text, encoding="utf-8")
    if html:
        (trial.output / PAGE_FILE).write_text(render_page(trial), encoding="utf-8")
