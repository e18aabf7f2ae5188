"""The one reader of YAML that others wrote: recipes and the front matter of model cards.

Bounded in size, depth and in what aliases expand to; no key twice, no tag but those of plain values, no
lone surrogates. Numbers of base 60 and dates are strings: `40:90` and `2024-07-26` mean what they say.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from bake.errors import BakeError, CheckpointError
from bake.io.foreign_json import MAX_DEPTH, read_bounded

MAX_BYTES = 1_000_000  # The longest front matter in use, of benchmark results, has 300 kB.
MAX_VALUES = 100_000  # With every alias written out; read within 10 s.

_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
}
_KINDS: dict[type, str] = {dict: "a mapping of keys", list: "a list", str: "a text"}


class _RefusedError(ValueError):
    """Something that YAML allows and bake does not."""


def load_yaml(
    text: str | bytes,
    name: str | Path,
    *,
    error: type[BakeError] = CheckpointError,
    kind: type[Any] | tuple[type[Any], ...] | None = dict,
    remedy: str = "mend it",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the value of a YAML text that others wrote: one document of plain values.

    name: what messages call it. kind: the type of the top value, or several; None for any. Raises
    `error`, in one line that ends in `remedy`.
    """
    import yaml

    try:
        if len(text) > max_bytes:
            raise _RefusedError(f"it has {len(text)} bytes, above the {max_bytes} allowed")
        string = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        loader = _loader()(string)
        try:
            node = loader.get_single_node()
            if node is not None:
                _check_node(node)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text ({problem.reason}): {remedy}") from None
    except RecursionError:
        raise error(
            f"{name} cannot be read: it is nested more than {MAX_DEPTH} levels deep: {remedy}"
        ) from None
    except yaml.YAMLError as problem:
        raise error(f"{name} is not YAML ({_explain(problem)}): {remedy}") from None
    except _RefusedError as problem:
        raise error(f"{name} cannot be read: {problem}: {remedy}") from None
    except (ValueError, LookupError):  # `!!int ""`, or a number of thousands of digits.
        raise error(f"{name} is not YAML (a value is not what its tag says): {remedy}") from None
    if kind is not None and not isinstance(value, kind):
        kinds: tuple[type[Any], ...] = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_KINDS.get(each, each.__name__) for each in kinds)
        found = "empty" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")
        raise error(f"{name} is not {wanted} but {found}: {remedy}")
    return value


def read_yaml(
    path: Path,
    *,
    error: type[BakeError] = CheckpointError,
    kind: type[Any] | tuple[type[Any], ...] | None = dict,
    remedy: str = "mend it",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Return the value of a YAML file that others wrote, as `load_yaml` does.

    Raises `error` also where the file is missing, unreadable or no regular file.
    """
    data = read_bounded(path, max_bytes, error=error, remedy=remedy)
    return load_yaml(data, path, error=error, kind=kind, remedy=remedy, max_bytes=max_bytes)


@cache
def _loader() -> Any:
    """Return a safe loader that reads 40:90 and dates as strings and refuses a key that is there twice."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values only, and no more of them than are allowed."""

        composed = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.composed += 1
            if self.composed > MAX_VALUES:
                raise _RefusedError(f"it holds more than {MAX_VALUES} values")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _check_keys(node)
            return super().construct_mapping(node, deep=deep)

    dropped = {f"{_TAG}timestamp", f"{_TAG}value", f"{_TAG}int", f"{_TAG}float"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in dropped]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    # YAML 1.1's numbers without those of base 60, and with an exponent that has no point or sign (1e5).
    integer = r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)"
    number = (
        r"[-+]?(?:(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
    )
    for tag, pattern, first in (
        ("int", integer, "-+0123456789"),
        ("float", number, "-+0123456789."),
    ):
        Loader.add_implicit_resolver(f"{_TAG}{tag}", re.compile(f"^(?:{pattern})$"), list(first))
    return Loader


def _check_keys(node: Any) -> None:
    """Refuse a mapping that has a key twice; a key that a merge (`<<`) brings may be there again."""
    seen = set()
    for key, _ in getattr(node, "value", ()):
        if isinstance(key.value, str) and not key.tag.endswith(":merge"):
            if (key.tag, key.value) in seen:
                raise _RefusedError(f"it has the key {key.value!r} twice")
            seen.add((key.tag, key.value))


def _check_node(top: Any) -> None:
    """Refuse what is too deep, too much with aliases written out, of a tag of its own, or no character."""
    sizes: dict[int, int] = {}

    def measure(node: Any, depth: int) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise _RefusedError("it has an alias inside of what it stands for")
            return sizes[id(node)]
        if depth > MAX_DEPTH:
            raise _RefusedError(f"it is nested more than {MAX_DEPTH} levels deep")
        if node.tag not in _PLAIN:
            raise _RefusedError(f"it has the tag {node.tag!r}; plain values only")
        sizes[id(node)], size = -1, 1
        if isinstance(node.value, str):
            _check_characters(node.value)
        else:
            for entry in node.value:
                for child in entry if isinstance(entry, tuple) else (entry,):
                    size += measure(child, depth + 1)
                    if size > MAX_VALUES:
                        raise _RefusedError(
                            f"it holds more than {MAX_VALUES} values, aliases included"
                        )
        sizes[id(node)] = size
        return size

    measure(top, 1)


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _RefusedError("it has half of a surrogate pair, which is no character") from None


def _explain(problem: Any) -> str:
    """Return a YAML error as one line with its place."""
    mark = getattr(problem, "problem_mark", None)
    reason = getattr(problem, "problem", None) or getattr(problem, "reason", None) or str(problem)
    place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{' '.join(str(reason).split())}{place}"
