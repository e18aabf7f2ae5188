"""The one reader of JSON that others wrote: configs, indexes, tokenizers, bakes, pairs, server answers.

Bounded in size, depth and the length of numbers; no duplicate keys, no lone surrogates, no NaN; the top
value is of the kind that is expected. Whatever is wrong is one line that names the file. What the
values mean is for the callers; JSON that bake's own package ships is read with `json` itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bake.errors import BakeError, CheckpointError
from bake.io.git_lfs import check_data

MAX_BYTES = 200_000_000  # The largest tokenizer.json in use has 40 MB.
MAX_DEPTH = 64  # Real configs nest 6 levels; Python's own recursion ends near 1000.
MAX_DIGITS = 400  # More than any float64 written out.

_KINDS: dict[type, str] = {dict: "a JSON object", list: "a JSON array", str: "a JSON string"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _RefusedError(ValueError):
    """Something that JSON's grammar allows and bake does not."""


def parse_json(
    text: str | bytes,
    name: str | Path,
    *,
    error: type[BakeError] = CheckpointError,
    kind: type[Any] | tuple[type[Any], ...] | None = dict,
    remedy: str = "download or save it again",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the value of a JSON text that others wrote.

    name: what messages call it, a path or `FILE:LINE`. kind: the type of the top value, or several;
    None for any. Infinity is taken, because configs of state-space models have it. Raises `error`, in
    one line that ends in `remedy`.
    """
    try:
        if len(text) > max_bytes:
            raise _RefusedError(f"it has {len(text)} bytes, above the {max_bytes} allowed")
        string = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            string,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        _check_depth(value)
        if _SURROGATE.search(string):
            _check_strings(value)
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text ({problem.reason}): {remedy}") from None
    except json.JSONDecodeError as problem:
        check_data(string[:64].encode(errors="replace"), name, error)
        place = f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{name} is not JSON ({problem.msg} at {place}): {remedy}") from None
    except RecursionError:
        raise error(
            f"{name} cannot be read: it is nested more than {MAX_DEPTH} levels deep: {remedy}"
        ) from None
    except _RefusedError as problem:
        raise error(f"{name} cannot be read: {problem}: {remedy}") from None
    if kind is not None and not isinstance(value, kind):
        kinds: tuple[type[Any], ...] = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_KINDS.get(each, each.__name__) for each in kinds)
        raise error(f"{name} is not {wanted} but {_describe(value)}: {remedy}")
    return value


def read_json(
    path: Path,
    *,
    error: type[BakeError] = CheckpointError,
    kind: type[Any] | tuple[type[Any], ...] | None = dict,
    remedy: str = "download or save it again",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the value of a JSON file that others wrote, as `parse_json` does.

    Raises `error` also where the file is missing, unreadable or no regular file.
    """
    value, _ = read_json_text(path, error=error, kind=kind, remedy=remedy, max_bytes=max_bytes)
    return value


def read_json_text(
    path: Path,
    *,
    error: type[BakeError] = CheckpointError,
    kind: type[Any] | tuple[type[Any], ...] | None = dict,
    remedy: str = "download or save it again",
    max_bytes: int = MAX_BYTES,
) -> tuple[Any, str]:
    """Return the value of a JSON file and its text, line ends as they are, as `read_json` does."""
    data = read_bounded(path, max_bytes, error=error, remedy=remedy)
    value = parse_json(data, path, error=error, kind=kind, remedy=remedy, max_bytes=max_bytes)
    return value, data.decode("utf-8")


def read_bounded(
    path: Path, max_bytes: int, *, error: type[BakeError] = CheckpointError, remedy: str
) -> bytes:
    """Return a regular file's bytes; raise `error` where there are more than `max_bytes` of them.

    A pipe or a device, which may never end, is refused.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path} is not a regular file: {remedy}")
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem}): {remedy}") from None
    except ValueError:
        raise error(f"{path} is no file's name (it holds a NUL character): {remedy}") from None
    if len(data) > max_bytes:
        raise error(f"{path} has more than the {max_bytes} bytes allowed: {remedy}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"it has the key {key!r} twice")
            seen.add(key)
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _RefusedError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    if len(digits) > MAX_DIGITS:
        raise _RefusedError(f"it has a number of {len(digits)} digits")
    return float(digits)


def _constant(name: str) -> float:
    if name == "NaN":
        raise _RefusedError("it has NaN for a number")
    return float(name)


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        below: list[Any] = []
        for item in level:
            values = item.values() if isinstance(item, dict) else item
            below.extend(entry for entry in values if isinstance(entry, dict | list))
        level = below
    raise _RefusedError(f"it is nested more than {MAX_DEPTH} levels deep")


def _check_strings(value: Any) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise _RefusedError(
                    "it has half of a surrogate pair, which is no character"
                ) from None


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    return _KINDS.get(type(value), f"a {type(value).__name__}")
