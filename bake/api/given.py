"""What Python may give where the command line names files: lists, mappings, objects, a loaded model.

The stages read files. What is given as a list of pairs, texts or words is written to one for as long as a
command runs, so that it is read, checked and announced as any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bake.directions.formats.objects import given_as_file
from bake.errors import DirectionError, PromptError
from bake.io.work_directory import temporary_directory
from bake.strength.coefficients import write_band
from bake.texts.pairs import ContrastPair

Model = str | Path | tuple[Any, Any]  # a path, a Hub id, or (model, tokenizer)
GivenPairs = str | Path | Iterable[tuple[str, ...] | Mapping[str, Any] | ContrastPair]
GivenTexts = str | Path | Iterable[str]
PAIRS, TEXTS = ("pairs", "held_out"), ("prompts", "neutral", "openings")


@contextmanager
def as_files(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield options as the stages hold them: paths as text, and lists and objects as files.

    pairs, held_out: tuples (positive, negative) or (prompt, positive, negative), mappings with these
    keys, or `ContrastPair`s. prompts, neutral, openings: texts. words: words. direction, ablate: see
    `given_as_file`. Raises PromptError or DirectionError for anything else.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_directory("bake-given-"))
        taken = {
            name: _as_file(name, value, folder) if name != "direction" else value
            for name, value in options.items()
        }
        for name in ("direction", "ablate"):
            value = taken.get(name)
            listed = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
            if name in taken and not (name == "ablate" and listed):
                taken[name] = stack.enter_context(given_as_file(value))
        yield taken


def as_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose paths are text and whose lists are tuples, as the stages hold them."""
    return {
        name: str(value)
        if isinstance(value, Path)
        else tuple(value)
        if isinstance(value, list)
        else value
        for name, value in options.items()
    }


def _as_file(name: str, value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return str(value)
    if name in (*PAIRS, *TEXTS, "words") and not isinstance(value, Iterable | None):
        raise PromptError(
            f"{name} is of type {type(value).__name__}; give a list, or the name of a file"
        )
    if name in PAIRS and not (value is None or isinstance(value, str)):
        return _write(folder / f"{name}.jsonl", [_row_of(entry, name) for entry in value])
    if name in TEXTS and not (value is None or isinstance(value, str)):
        return _write(folder / f"{name}.jsonl", [_text_row(entry, name) for entry in value])
    if name == "words" and not (value is None or isinstance(value, str)):
        path = folder / "words.txt"
        path.write_text("".join(f"{word}\n" for word in value), encoding="utf-8")
        return str(path)
    if name == "bands":
        return tuple(band if isinstance(band, str) else write_band(band) for band in value)
    return tuple(value) if isinstance(value, list) and name not in ("band", "layers") else value


def _write(path: Path, rows: list[Mapping[str, Any]]) -> str:
    try:
        lines = [json.dumps(dict(row)) for row in rows]
    except (TypeError, ValueError) as error:
        raise DirectionError(f"{path.stem}: {error}; give texts") from None
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def _row_of(entry: Any, name: str) -> Mapping[str, Any]:
    """Return a pair as a row of a file of pairs."""
    if isinstance(entry, ContrastPair):
        if entry.before is None:
            return {
                "prompt": entry.prompt, "positive": entry.positive, "negative": entry.negative
            }  # fmt: skip
        sides = zip(
            ("positive", "negative"), entry.before, (entry.positive, entry.negative), strict=True
        )
        return {
            side: [*before, {"role": entry.role, "content": text}] for side, before, text in sides
        }
    if isinstance(entry, Mapping):
        return entry
    if isinstance(entry, tuple | list) and len(entry) in (2, 3):
        return dict(zip(("prompt", "positive", "negative")[-len(entry) :], entry, strict=True))
    raise DirectionError(
        f"{name} holds {type(entry).__name__} {str(entry)[:60]!r}; a pair is a tuple (positive, negative) "
        "or (prompt, positive, negative), a mapping with these keys, or a ContrastPair"
    )


def _text_row(entry: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(entry, str):
        raise PromptError(
            f"{name} holds a {type(entry).__name__}; give texts, or the name of a file"
        )
    return {"text": entry}
