"""A first look at a command's options: mistakes that config.json and the files' own heads show.

They are told before torch is imported and a model is opened or fetched. What only the model can tell is
left to the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bake.checkpoint.outline import Outline, read_outline
from bake.directions.formats import check_width


def look_first(
    model: Any,
    revision: str | None = None,
    *,
    directions: Iterable[Any] = (),
    layers: Iterable[Callable[[int], object]] = (),
) -> Outline:
    """Raise a BakeError for a direction of another width than the model's, and for layers it has not.

    directions: references as the user gave them; objects are left to the stages. layers: functions of the
    number of layers that raise where the user's choice does not fit. Of a model in memory nothing is looked
    at. Returns the model's sizes.
    """
    if not isinstance(model, str | Path):
        return Outline(None, None)
    outline = read_outline(str(model), revision)
    for check in layers:
        if outline.layer_count is not None:
            check(outline.layer_count)
    for reference in sorted(directions, key=lambda name: not str(name).endswith(".safetensors")):
        check_width(reference, outline.hidden_size)
    return outline
