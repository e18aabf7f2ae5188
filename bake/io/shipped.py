"""Where the data that ships with bake lies: prompt sets, contrast pairs, card templates, the model.

In a checkout `calibration/` and `model_cards/` are beside the package, in a wheel inside it. A name
such as `neutral` or `formal-casual` means a shipped file wherever a user may give a path.
"""

from __future__ import annotations

from pathlib import Path

from bake.io.foreign_paths import expand_user

_PACKAGE = Path(__file__).parent.parent
DEMO_NAME = "bake-demo"
OPENINGS, REQUESTS = "openings", "requests"  # continued as they are, or as conversations
DEMO_MODEL = _PACKAGE / "demo" / "model"
DEMO_DIRECTION = _PACKAGE / "demo" / "direction.safetensors"
# What a direction that ships is tried on, where the user names nothing else.
_TRIED_ON = {
    DEMO_NAME: {
        "pairs": "toy-cheerful-gloomy.held-out",
        "words": "cheerful",
        "neutral": "toy-neutral",
    }
}


def tried_on(direction: str | None) -> dict[str, str]:
    """Return the sets that suit a direction that ships, by what they are for; none for a file."""
    return dict(_TRIED_ON.get(direction or "", {}))


def shipped(folder: str) -> Path:
    """Return the directory `calibration` or `model_cards`, wherever this installation keeps it."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def shipped_sets(kind: str) -> dict[str, Path]:
    """Return {name: file} of the shipped sets of a kind: `prompts`, `pairs` or `words`."""
    folder = shipped("calibration") / kind
    return {path.stem: path for path in sorted(folder.glob("*")) if path.is_file()}


def find_set(name: str, kind: str) -> Path | None:
    """Return the file that a user's NAME means: a path that exists, else a shipped set, else None."""
    path = expand_user(name)
    if path.is_file():
        return path
    return shipped_sets(kind).get(name)


def find_model(name: str) -> str:
    """Return the path or Hub id that a user's MODEL means; `bake-demo` is the model that ships."""
    if name == DEMO_NAME and not Path(name).exists():
        return str(DEMO_MODEL)
    return name


def find_direction(name: str) -> Path:
    """Return the file that a user's --direction means; `bake-demo` is the direction that ships."""
    path = expand_user(name)
    if name == DEMO_NAME and not path.exists():
        return DEMO_DIRECTION
    return path
