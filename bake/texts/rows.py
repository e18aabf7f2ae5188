"""Files of others → rows: JSONL, JSON arrays, CSV, plain text. What a row means is for the callers.

Bounded in size; UTF-8 only; no key or column twice. Every error is one line that names the file, and the
line or row in it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bake.errors import PromptError
from bake.io.foreign_json import parse_json, read_bounded
from bake.support.progress import announce

MAX_BYTES = 200_000_000  # of a file
MAX_LINE = 10_000_000  # of a line of JSONL
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_REMEDY = "mend the line"

# Keys of one row whose values may be lists of objects: conversations.
_OF_A_ROW = frozenset(
    ("messages", "conversations", "prompt", "positive", "negative", "chosen", "rejected")
)

Row = tuple[str, Any]  # Where it stands ("pairs.jsonl:3"), and what it is.


def read_text(path: Path) -> str:
    """Return a file's text, line ends as line feeds, without the mark that editors of Windows put first.

    Raises PromptError for a file that is too large, no UTF-8, or no text.
    """
    data = read_bounded(path, MAX_BYTES, error=PromptError, remedy="give a smaller file of text")
    encoding = _MARKS.get(data[:2])
    try:
        if encoding:
            raise PromptError(
                f"{path} cannot be read as UTF-8 text: it is {encoding}; save it as UTF-8"
            )
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} cannot be read as UTF-8 text: {error}; save it so") from None
    if "\0" in text:
        raise PromptError(f"{path} holds NUL characters, so it is no text; save it again")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL file or of a JSON array; raise PromptError for what is neither.

    A JSON object is read where one of its lists holds the rows ("train"), or where its lists are columns.
    """
    text = read_text(path)
    start = text.lstrip()[:1]
    if start == "[" or (start == "{" and not _has_line_objects(text)):
        value = parse_json(
            text,
            path,
            error=PromptError,
            kind=(list, dict),
            remedy="mend it, or write one object a line",
        )
        rows = value if isinstance(value, list) else _open(value, path)
        return [(f"{path.name}, row {number}", row) for number, row in enumerate(rows, start=1)]
    # Lines end at line feeds only: JSON strings may hold the other separators that splitlines knows.
    return [
        (place, parse_json(line, place, **_LINE))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
        for place in [f"{path.name}:{number}"]
    ]


_LINE: dict[str, Any] = {
    "error": PromptError,
    "kind": dict,
    "remedy": _REMEDY,
    "max_bytes": MAX_LINE,
}


def read_csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Return the header of a CSV file and its rows, {column: text}; raise PromptError for a broken one."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header = [name.strip() for name in _next(reader, path)]
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise PromptError(
            f"{path}: the header row has the column {twice!r} twice; leave one of them"
        )
    return header, _csv_rows(reader, path, header)


def _next(reader: Any, path: Path) -> list[str]:
    try:
        return next(reader, [])
    except csv.Error as error:
        raise PromptError(f"{path} cannot be read as UTF-8 CSV: {error}") from None


def _csv_rows(reader: Any, path: Path, header: Sequence[str]) -> Iterator[Row]:
    while row := _next(reader, path):
        place = f"{path.name}:{reader.line_num}"
        if len(row) != len(header):
            raise PromptError(
                f"{place} has not the header's {len(header)} columns; put texts with commas in quotes"
            )
        yield place, dict(zip(header, row, strict=True))


def _has_line_objects(text: str) -> bool:
    """Tell whether a text that begins with an object has an object a line, rather than one over many."""
    lines = [line.strip() for line in text.lstrip().split("\n", 2)[:2] if line.strip()]
    first = lines[0]
    if not first.endswith("}"):
        return False
    return len(lines) > 1 or "[" not in first


def _open(value: dict[str, Any], path: Path) -> list[Any]:
    """Return the rows of a JSON object: its columns, its one list of rows, or itself."""
    lists = {key: entry for key, entry in value.items() if isinstance(entry, list) and entry}
    columns = {key: each for key, each in lists.items() if all(isinstance(x, str) for x in each)}
    lengths = {len(each) for each in columns.values()}
    if len(columns) > 1 and len(lengths) == 1:
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if value.keys() & _OF_A_ROW:
        return [value]
    of_rows = [key for key, each in lists.items() if all(isinstance(entry, dict) for entry in each)]
    chosen = of_rows[0] if len(of_rows) == 1 else "train" if "train" in of_rows else None
    if chosen is None:
        if len(columns) == 1 and len(lists) == 1:
            chosen = next(iter(columns))
        else:
            return [value]
    others = [key for key in value if key != chosen]
    left = f"; left out: {', '.join(map(repr, others))}" if others else ""
    announce(f"{path.name}: the {len(lists[chosen])} rows of {chosen!r} are read{left}")
    return lists[chosen]
