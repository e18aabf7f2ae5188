"""Pages: one HTML file each, with its figures inside, from a template that ships."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bake.card.figures import alternative
from bake.io.shipped import shipped


def render_page(
    template: str,
    figures: Path,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """Return a page; the figures must have been drawn into the folder. Everything in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(shipped("model_cards")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    drawn = [
        {"alt": alternative(path), "data": base64.b64encode(path.read_bytes()).decode()}
        for path in sorted(figures.glob("*.png"))
    ]
    return environment.get_template(template).render(figures=drawn, **values)
