"""The directory of a search: recipe.yaml, report.json, figures, and a page where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

from bake.card.figures import FIGURES, draw_layer_curve, draw_ranking
from bake.card.pages import render_page
from bake.sweeps.files import PAGE_FILE, check_directory, make_directory, write_text, writing
from bake.sweeps.store import MEASUREMENTS_FILE, REPORT_FILE
from bake.tuning.result import RECIPE_FILE, Tuned

TEMPLATE = "tune.html.jinja"
HEAD = """\
# What bake tune found to move held-out pairs most at KL {target:g} on neutral text:
# {name}, {moved:+.3f} nats a token.
#     bake export --recipe {file} --output DIR
"""
DIVIDED = """\
# A fourth of the pairs judged and is in the direction too when this is baked: it may differ a little.
"""


def check_place(output: Path) -> None:
    """Raise OutputError where no search can be written, before the work for it is done."""
    known = {MEASUREMENTS_FILE, REPORT_FILE, RECIPE_FILE, PAGE_FILE, FIGURES}
    check_directory(output, "search", known)


def prepare_directory(output: Path) -> Path:
    """Make the directory; one that holds something else than a search is left alone."""
    check_place(output)
    return make_directory(output)


def write_all(tuned: Tuned, *, html: bool) -> None:
    """Write everything, each file whole or not at all; an earlier search's page goes."""
    output, figures = tuned.output, tuned.output / FIGURES
    with writing(output):
        for path in figures.glob("*.png"):
            path.unlink()
        draw_ranking(figures / "ranking.png", tuned.ranking.finalists)
        if len(tuned.ranking.layers) > 1:
            draw_layer_curve(figures / "layer-curve.png", tuned.ranking.layers, tuned.best)
        if tuned.refusal is None:
            write_text(output / RECIPE_FILE, _recipe_text(tuned))
        else:
            (output / RECIPE_FILE).unlink(missing_ok=True)
        text = json.dumps(tuned.report(), indent=2, ensure_ascii=False)
        write_text(output / REPORT_FILE, text + "\n")
        if html:
            write_text(output / PAGE_FILE, _page(tuned))
        else:
            (output / PAGE_FILE).unlink(missing_ok=True)


def _recipe_text(tuned: Tuned) -> str:
    import yaml

    best = tuned.best
    head = HEAD.format(
        target=tuned.options.target_kl,
        name=best.candidate.name,
        moved=best.moved,
        file=RECIPE_FILE,
    )
    if tuned.divided:
        head += DIVIDED
    return head + yaml.safe_dump(tuned.recipe(), sort_keys=False, allow_unicode=True)


def _page(tuned: Tuned) -> str:
    return render_page(
        TEMPLATE,
        tuned.output / FIGURES,
        title=f"Where to push {tuned.base.to_dict()['id']}",
        tuned=tuned,
        ranking=tuned.ranking,
        target=tuned.options.target_kl,
        refusal=tuned.refusal,
        recipe=_recipe_text(tuned),
    )
