"""What a `bake.json` may hold: it comes with a stranger's bake, and every name, number and type is checked.

The shape is data: a check for every key that some command reads. A key that is none of them is left
alone, because older and newer bakes have others. What the values mean is for the callers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from bake.errors import BakeError, CheckpointError
from bake.io.foreign_paths import check_names

VERSION = 1
MAX_LAYER = 100_000
MAX_WIDTH = 10_000_000
MAX_BYTES = 1 << 60
MAX_NUMBER = 3.4e38  # What float32 holds.
_SHA256 = re.compile(r"[0-9a-f]{64}")

# A check is told a value and where it stands, and raises _WrongError.
Check = Callable[[Any, str], None]


class _WrongError(ValueError):
    """What a value is, and what it has to be."""


def check_record(
    record: Mapping[str, Any],
    source: Path,
    *,
    needed: Collection[str] = (),
    error: type[BakeError] = CheckpointError,
) -> None:
    """Raise `error`, one line, where a `bake.json` lacks a key of `needed` or holds what it must not.

    source: the file, for the message. Names of files are checked as `foreign_paths.check_names` does.
    """
    remedy = "make it again with bake export, or get the whole bake again"
    version = record.get("version")
    if type(version) is int and version > VERSION:
        raise error(f"{source} is of version {version}, which a newer bake wrote: update bake")
    missing = [key for key in needed if key not in record]
    if missing:
        raise error(f"{source} is not a bake.json of version 1: it has no {missing[0]}; {remedy}")
    try:
        _fields({}, _RECORD)(record, "")
    except _WrongError as problem:
        raise error(f"{source} is damaged: {problem}; {remedy}") from None
    _check_files(record, source, error)


def _check_files(record: Mapping[str, Any], source: Path, error: type[BakeError]) -> None:
    """Check every name of a file that some command makes a path of."""
    weights = ".safetensors"
    undo, thin, sweep = (record.get(key) or {} for key in ("undo", "thin", "sweep"))
    shards = thin.get("shards", ())
    check_names(record.get("files", {}), source, error=error)
    check_names(undo.get("files", {}), source, suffixes=weights, error=error)
    check_names(undo.get("files", {}).values(), source, suffixes=weights, error=error)
    check_names(undo.get("companions", {}), source, suffixes=".json", error=error)
    check_names([shard["name"] for shard in shards], source, suffixes=weights, error=error)
    check_names([shard["base_file"] for shard in shards], source, suffixes=weights, error=error)
    check_names(sweep.get("figures", ()), source, suffixes=".png", error=error)
    removed = [entry["file"] for entry in record.get("removed", ())]
    check_names(removed, source, suffixes=weights, error=error)


def _fields(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    def check(value: Any, where: str) -> None:
        _expect(isinstance(value, Mapping), value, where, "an object")
        for key in needed:
            if key not in value:
                raise _WrongError(f"{where or 'the top'} has no {key}")
        for key, of in {**needed, **(optional or {})}.items():
            if key in value:
                of(value[key], f"{where}.{key}" if where else key)

    return check


def _each(of: Check, *, least: int = 0, most: int | None = None) -> Check:
    def check(value: Any, where: str) -> None:
        _expect(isinstance(value, list), value, where, "a list")
        if len(value) < least or (most is not None and len(value) > most):
            raise _WrongError(f"{where} has {len(value)} entries")
        for place, entry in enumerate(value):
            of(entry, f"{where}[{place}]")

    return check


def _mapping(of: Check) -> Check:
    def check(value: Any, where: str) -> None:
        _expect(isinstance(value, Mapping), value, where, "an object")
        for key, entry in value.items():
            of(entry, f"{where}.{key}")

    return check


def _or_null(of: Check) -> Check:
    def check(value: Any, where: str) -> None:
        if value is not None:
            of(value, where)

    return check


def _count(least: int, most: int) -> Check:
    def check(value: Any, where: str) -> None:
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        _expect(fits, value, where, f"a whole number from {least} to {most}")

    return check


def _one_of(*known: Any) -> Check:
    def check(value: Any, where: str) -> None:
        _expect(value in known, value, where, f"one of {', '.join(map(str, known))}")

    return check


def _number(value: Any, where: str) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    _expect(fits and math.isfinite(value) and abs(value) < MAX_NUMBER, value, where, "a number")


def _positive(value: Any, where: str) -> None:
    _number(value, where)
    _expect(value > 0, value, where, "a number above 0")


def _text(value: Any, where: str) -> None:
    _expect(isinstance(value, str), value, where, "a text")


def _flag(value: Any, where: str) -> None:
    _expect(isinstance(value, bool), value, where, "true or false")


def _hash(value: Any, where: str) -> None:
    _expect(isinstance(value, str) and _SHA256.fullmatch(value), value, where, "a SHA-256")


def _anything(value: Any, where: str) -> None:
    """A value of the base's own config."""


def _given(value: Any, where: str) -> None:
    _mapping(_number)(value, where)
    wrong = next((key for key in value if not re.fullmatch(r"\d{1,6}", key)), None)
    _expect(wrong is None, wrong, where, "numbers by layer")


def _layers(value: Any, where: str) -> None:
    entry = {"layer": _layer, "activation_norm": _positive, "coefficient": _number}
    _each(_fields(entry), least=1)(value, where)
    strange = next((key for each in value for key in each if key not in entry), None)
    _expect(strange is None, strange, where, f"layers with {', '.join(entry)} alone")
    numbers = [each["layer"] for each in value]
    _expect(len(set(numbers)) == len(numbers), numbers, where, "different layers")


def _band(value: Any, where: str) -> None:
    _each(_layer, least=2, most=2)(value, where)
    _expect(value[0] < value[1], value, where, "the first layer and the one after the last")


def _expect(fits: Any, value: Any, where: str, wanted: str) -> None:
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise _WrongError(f"{where} is {shown} and has to be {wanted}")


_layer, _size = _count(0, MAX_LAYER), _count(0, MAX_BYTES)
_shape = _each(_count(0, MAX_BYTES), most=8)
_optional_text = _or_null(_text)

_SLOT = _fields(
    {
        "layer": _layer,
        "name": _text,
        "weight": _optional_text,
        "through_weight": _flag,
        "is_new": _flag,
        "old": _or_null(_number),
        "scale": _number,
        "transposed": _flag,
        "axis": _or_null(_count(-8, 8)),
        "span": _or_null(_each(_size, least=2, most=2)),
    },
    {"solved": _flag},
)

_RECORD: dict[str, Check] = {
    "version": _one_of(VERSION),
    "bake_version": _text,
    "base": _fields(
        {"id": _text},
        {"revision": _optional_text, "headers_sha256": _optional_text, "claimed": _flag},
    ),
    "about": _fields({}, dict.fromkeys(("name", "description", "concept"), _text)),
    "repo_id": _text,
    "licence": _or_null(_fields({}, {"notice": _optional_text})),
    "auto_class": _text,
    "layer_count": _count(1, MAX_LAYER),
    "added_layers": _layer,
    "site": _one_of("mlp_out", "attn_out", "attn_in", "mlp_in"),
    "route": _text,
    "slot": _fields(
        {"kind": _text, "route": _text, "description": _text}, {"rewritten_as": _optional_text}
    ),
    "law": _text,
    "multiplier": _number,
    "band": _band,
    "hidden_size": _count(1, MAX_WIDTH),
    "layers": _layers,
    "given_coefficients": _or_null(_given),
    "calibration": _fields(
        {},
        {
            "statistic": _one_of("mean", "median"),
            "texts": _or_null(_fields({"sha256": _hash}, {"set": _optional_text})),
        },
    ),
    "ablation": _fields(
        {
            "scope": _one_of("stream", "writes", "parts"),
            "strength": _number,
            "rank": _count(0, MAX_WIDTH),
            "layers": _each(_layer, least=1),
        },
        {"heads": _each(_text), "neurons": _each(_text), "mean": _flag},
    ),
    "layer_choice": _fields(
        {
            "layer": _layer,
            "reason": _text,
            "pairs": _size,
            "points": _each(_fields({"layer": _layer, "shift": _or_null(_number)})),
        }
    ),
    "removed": _each(_fields({"file": _text, "site": _text, "metadata": _mapping(_text)})),
    "direction": _fields({"site": _text, "metadata": _mapping(_text)}),
    "plan": _fields(
        {
            "added": _each(_text),
            "patched": _each(_text),
            "config_changes": _mapping(_anything),
            "dtype": _text,
            "slots": _each(_SLOT),
        },
        {"config_removed": _each(_text)},
    ),
    "undo": _fields(
        {
            "files": _mapping(_text),
            "indexed": _flag,
            "config": _mapping(_each(_anything, most=1)),
            "renamed": _mapping(_text),
            "joined": _mapping(_fields({"parts": _each(_text, least=1), "shape": _shape})),
            "lost": _each(_text),
            "tokenizer_class": _or_null(_each(_anything, most=1)),
        },
        {"companions": _mapping(_mapping(_anything))},
    ),
    "left_out": _each(_fields({"kind": _text, "names": _each(_text), "reason": _text})),
    "equivalence": _fields(
        {},
        {
            "passed": _flag,
            "verified": _flag,
            "reason": _text,
            "rounding_allowed": _flag,
            "remainder": _or_null(_fields(dict.fromkeys(("base", "baked", "plain"), _number))),
            "canary": _or_null(_fields(dict.fromkeys(("prompt", "baked", "base"), _text))),
            "forks": _each(
                _fields(
                    {**dict.fromkeys(("prompt", "baked", "base"), _text), "margin": _number},
                    dict.fromkeys(("tilt_base", "tilt_baked"), _number),
                )
            ),
            "samples": _each(_fields(dict.fromkeys(("opening", "base", "baked"), _text))),
            "cost": _or_null(
                _fields(
                    {
                        "kl_mean": _number,
                        "kl_p95": _number,
                        "top1_agreement": _number,
                        "accumulated": _or_null(_number),
                        "tokens": _size,
                    }
                )
            ),
        },
    ),
    "thin": _fields(
        {
            "shards": _each(
                _fields(
                    {"name": _text, "base_file": _text, "size": _size, "sha256": _or_null(_hash)}
                )
            )
        }
    ),
    "sweep": _fields({}, {"figures": _each(_text)}),
    "files": _mapping(_fields({"sha256": _hash, "size": _size})),
}
