"""The page of a sweep: one HTML file that holds its figures and its samples side by side."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from bake.card.figures import FIGURES
from bake.card.pages import render_page
from bake.models.generation import WORD
from bake.sweeps.findings import compare_laws
from bake.sweeps.points import Point
from bake.sweeps.results import Trial
from bake.sweeps.window import Window
from bake.version import __version__

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = "sweep.html.jinja"


def render_trial(trial: Trial) -> str:
    """Return the page; the figures must have been drawn. Everything in it is escaped."""
    found = trial.found
    words = trial.texts.words
    costs = found.laws_at_equal_shift()
    curve = found.curve()
    base_first = sorted(curve, key=lambda point: point.arm.multiplier != 0)
    others = [p for p in found.points if not p.arm.is_control and p not in curve]
    ablated = [point for point in others if point.arm.kind == "ablation"]
    written = [p.arm.name for p in [*base_first, *ablated] if p.fluency is not None]
    return render_page(
        TEMPLATE,
        trial.output / FIGURES,
        {"marked": lambda text: mark_words(text, words)},
        title=f"{trial.base.to_dict()['id']}: {trial.names.direction} at every strength",
        direction_name=trial.names.direction,
        pairs_name=trial.names.pairs,
        pairs_count=len(trial.texts.pairs),
        command=trial.names.command,
        version=__version__,
        base=trial.base.to_dict(),
        direction=trial.direction.to_dict(),
        variant=found.design.variants[0],
        design=found.design,
        points=curve,
        others=others,
        ablations=found.ablations,
        controls=found.controls,
        windows=found.windows,
        specificity=found.specificity,
        costs=costs,
        costs_sentence=compare_laws(costs),
        arms=written,
        inside={point.arm.name for point in curve if _is_inside(point, found.windows)},
        words=words,
        instruction=found.design.instruction,
        last_token=any(v.injection == "last-token" for v in found.design.variants),
        judge=found.judge,
        agreement=found.agreement,
        samples=found.samples,
        attribution=trial.attribution,
    )


def mark_words(text: str, words: Collection[str]) -> Markup:
    """Return text as HTML, escaped, with the target words marked."""
    from markupsafe import Markup, escape

    pieces, end = [], 0
    for match in WORD.finditer(text):
        if match[0].lower() in words:
            pieces += [escape(text[end : match.start()]), Markup("<mark>%s</mark>") % match[0]]
            end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


def _is_inside(point: Point, windows: Sequence[Window]) -> bool:
    """Tell whether a point lies in the operating window; the base does."""
    size = point.arm.multiplier
    edges = [window.largest for window in windows if window.largest is not None]
    return min([0.0, *edges]) <= size <= max([0.0, *edges])
