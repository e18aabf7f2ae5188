"""Pages: one HTML file each, with its figures inside, from a template that ships."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bake.card.figures import NARROW_SUFFIX, alternative
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
        {"alt": alternative(path), "data": _encoded(path), "narrow": _encoded(_narrow(path))}
        for path in sorted(figures.glob("*.png"))
        if not path.stem.endswith(NARROW_SUFFIX)
    ]
    return environment.get_template(template).render(figures=drawn, **values)


def _narrow(path: Path) -> Path:
    """Return where the same figure lies for a narrow screen."""
    return path.with_name(f"{path.stem}{NARROW_SUFFIX}.png")


def _encoded(path: Path) -> str | None:
    """Return a picture as text that a page can hold; None where there is none."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None
