"""The story: the model card of a bake, rendered from the values that the stages returned.

Templates are Jinja files in `model_cards/`, rendered with StrictUndefined: a missing value is an error,
never an empty place in a published card.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bake.front_matter import compose_front_matter
from bake.licences import card_lines
from bake.resources import shipped

if TYPE_CHECKING:
    from jinja2 import Environment

CARD_TEMPLATE = "card.md.jinja"


def table_cell(text: str) -> str:
    """Return text as one cell of a Markdown table: quoted, on one line, bars escaped."""
    return json.dumps(text, ensure_ascii=False).replace("|", "\\|")


def figure(value: float | None, form: str, factor: float = 1.0) -> str:
    """Return a figure as text, a dash for one that was not measured."""
    return "–" if value is None else form % (factor * value)


def interval(values: Mapping[str, float | None] | None, form: str) -> str:
    """Return a figure with its interval in brackets, a dash for one that was not measured."""
    if values is None:
        return "–"
    value, low, high = (figure(values[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def card_environment() -> Environment:
    """Return the Jinja environment that the card's template is written for."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(shipped("model_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; the values are numbers and names of our own.
    )
    environment.filters |= {"cell": table_cell, "figure": figure, "interval": interval}
    return environment


def render_card(values: Mapping[str, Any]) -> str:
    """Return the card's Markdown. `values` are the keys of `bake.json`, see the template."""
    # Where a value is missing, the template says which.
    head = compose_front_matter(values) if "base" in values and "auto_class" in values else None
    return (
        card_environment()
        .get_template(CARD_TEMPLATE)
        .render(**values, front_matter=head, licence_lines=card_lines(values.get("licence") or {}))
    )
