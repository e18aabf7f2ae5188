"""Open what a page shows: from the options of `bake play`, or from the folder of a Space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake.checkpoint.checkpoint import find_bake
from bake.errors import BakeError
from bake.io.foreign_yaml import read_yaml
from bake.live.hear import Session, open_session
from bake.live.writing import Style
from bake.pipeline.record import read_result
from bake.play.stage import Stage, find_curve

SPACE_FILE, RECIPE_FILE = "space.yaml", "recipe.yaml"


def open_stage(model: Any, given: Mapping[str, Any], **own: Any) -> Stage:
    """Return the stage of options; see `open_session` for them."""
    session = open_session(model, given, **own)
    return Stage(session, title_of(session), find_curve(given.get("recipe")))


def title_of(session: Session) -> str:
    """Return what a page is called."""
    if session.knobs is None:
        return f"{session.name} beside its base"
    return f"{session.name}, steered along {' + '.join(session.knobs.steering.names)}"


def open_space(folder: Path) -> Stage:
    """Return the stage of a Space that `bake space` wrote; what it shows is fetched from the Hub.

    Raises BakeError where the folder is none.
    """
    space = read_yaml(folder / SPACE_FILE, error=BakeError, remedy="write it with bake space")
    style = Style()
    if "bake" in space:
        given = {"revision": space.get("revision")}
        session = open_session(str(space["bake"]), given, style=style)
        record = read_result(find_bake(str(space["bake"]), space.get("revision")))
        session.name = f"{record['base']['id']} and {space['bake']}"
    else:
        given = {"recipe": str(folder / RECIPE_FILE)}
        recipe = read_yaml(folder / RECIPE_FILE, error=BakeError, remedy="write it with bake space")
        for name in ("direction", "calibration"):
            given[name] = str(folder / str(recipe[name]))
        session = open_session("", given, style=style)
    return Stage(session, str(space["title"]))
