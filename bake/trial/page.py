"""The page of a sweep: one HTML file that holds its figures and its samples side by side."""

from __future__ import annotations

import base64
from pathlib import Path

from bake.dose_response import compare_laws
from bake.resources import shipped
from bake.trial.results import Trial

TEMPLATE = "sweep.html.jinja"


def render_page(trial: Trial) -> str:
    """Return the page; the figures must have been drawn. Everything in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(shipped("model_cards")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = trial.found
    costs = found.laws_at_equal_shift()
    curve = found.curve()
    written = [point.arm.name for point in curve if point.fluency is not None]
    return environment.get_template(TEMPLATE).render(
        title=f"{trial.base.to_dict()['id']}, steered",
        base=trial.base.to_dict(),
        direction=trial.direction.to_dict(),
        variant=found.design.variants[0],
        design=found.design,
        points=curve,
        others=[p for p in found.points if p.arm.kind != "random" and p not in curve],
        controls=found.controls,
        windows=found.windows,
        specificity=found.specificity,
        costs=costs,
        costs_sentence=compare_laws(costs),
        figures=[
            {"name": path.stem, "data": _encode(path)}
            for path in sorted((trial.output / "figures").glob("*.png"))
        ],
        arms=written,
        samples=found.samples,
        attribution=trial.attribution,
    )


def _encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
