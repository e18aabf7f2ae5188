"""The directory of a sweep: report.json, figures, and a page where it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from bake.card.figures import FIGURES, NARROW_SUFFIX, draw_dose_response, draw_norms
from bake.errors import OutputError
from bake.io.atomic import check_above
from bake.sweeps.page import render_trial
from bake.sweeps.results import Trial
from bake.sweeps.store import MEASUREMENTS_FILE, REPORT_FILE

PAGE_FILE, PARTIAL = "index.html", ".partial"


def check_place(output: Path) -> None:
    """Raise OutputError where no sweep can be written, before the work for it is done."""
    check_directory(output, "sweep", {MEASUREMENTS_FILE, REPORT_FILE, PAGE_FILE, FIGURES})


def prepare_directory(output: Path) -> Path:
    """Make the directory; one that holds something else than a sweep is left alone."""
    check_place(output)
    return make_directory(output)


def make_directory(output: Path) -> Path:
    """Make a directory, and those above it. Raises OutputError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be made: {error.strerror or error}") from None
    return output


def check_directory(output: Path, what: str, known: Set[str]) -> None:
    """Raise OutputError for a directory that holds other files, or that cannot be made."""
    known = {*known, *(name + PARTIAL for name in known)}
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} cannot be made: it is a file; give another --output")
    check_above(output / "below" if output.is_dir() else output)
    try:
        if output.is_dir():
            strange = sorted({entry.name for entry in output.iterdir()} - known)
            if strange:
                raise OutputError(
                    f"{output} holds {strange[0]}, which is no {what}'s: give another --output"
                )
    except OSError as error:
        raise OutputError(f"{output} cannot be read: {error.strerror or error}") from None


def write_report(trial: Trial, *, complete: bool) -> None:
    """Write report.json, whole or not at all. complete: whether everything in it was measured."""
    values = {**trial.report(), "complete": complete}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with writing(trial.output):
        write_text(trial.output / REPORT_FILE, text)


def write_pictures(trial: Trial, *, html: bool) -> None:
    """Write the figures, and the page where it is asked for; an earlier sweep's go."""
    figures, page = trial.output / FIGURES, trial.output / PAGE_FILE
    found = trial.found
    with writing(trial.output):
        drawn = [
            draw_norms(
                figures / "norms.png",
                found.norms,
                found.coefficients,
                found.design.variants[0].site,
            ),
            draw_dose_response(figures / "dose-response.png", found),
        ]
        if trial.attribution is not None:
            drawn.append(trial.attribution.draw(figures / "layers.png"))
        if html:
            name = f"dose-response{NARROW_SUFFIX}.png"
            drawn.append(draw_dose_response(figures / name, found, narrow=True))
        for path in figures.glob("*.png"):
            if path not in drawn:
                path.unlink()
        if html:
            write_text(page, render_trial(trial))
        else:
            page.unlink(missing_ok=True)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Name what went wrong where a directory cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{output} cannot be written: {error.strerror or error}; what was measured is kept, so the "
            f"same command goes on from there"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
