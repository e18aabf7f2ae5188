"""The way back: what `bake.json` records so that a bake can be undone and rescaled from itself alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Drop, Edit, Merge, Rename, Transform
from bake.checkpoint.writer import find_companion_code, removed_keys
from bake.io.foreign_json import read_json
from bake.texts.tokenizer import TOKENIZER_CONFIG

if TYPE_CHECKING:
    from bake.plan.plan import Changes


def describe_undo(
    checkpoint: Checkpoint,
    plan: Changes,
    sources: Mapping[str, str],
    *,
    tokenizer_changed: bool = False,
) -> dict[str, Any]:
    """Return the part of `bake.json` that says how to get from the bake back to its base.

    sources: {file of the bake: file of the base}. config: {key: [old value], or [] where the base
    has no such key}. tokenizer_class: likewise, of tokenizer_config.json; None where that was kept.
    companions: {file: {key: old value}} of what named code in them, where there was any.
    """
    companions = find_companion_code(checkpoint)
    transforms = [edit for edit in plan.edits if isinstance(edit, Transform)]
    return {
        "files": dict(sources),
        "indexed": checkpoint.index_metadata is not None,
        "config": {
            key: _lookup(checkpoint.config, key)
            for key in (*plan.config_changes, *removed_keys(checkpoint.config))
        },
        **({"companions": companions} if companions else {}),
        "renamed": {edit.new_name: edit.name for edit in plan.edits if isinstance(edit, Rename)},
        "joined": {
            edit.name: {
                "parts": list(edit.outputs),
                "shape": list(checkpoint.tensors[edit.name].shape),
            }
            for edit in transforms
            if edit.splits
        },
        "lost": sorted(_lost(plan.edits)),
        "tokenizer_class": _tokenizer_class(checkpoint) if tokenizer_changed else None,
    }


def _lost(edits: Sequence[Edit]) -> Iterator[str]:
    """Yield the tensors whose values cannot be had back from what the edits leave."""
    for edit in edits:
        if isinstance(edit, Merge):
            yield from edit.names
        elif isinstance(edit, Drop) or (isinstance(edit, Transform) and not edit.splits):
            yield edit.name


def _tokenizer_class(checkpoint: Checkpoint) -> list[Any]:
    path = checkpoint.directory / TOKENIZER_CONFIG
    values = read_json(path) if path.is_file() else {}
    return _lookup(values, "tokenizer_class")


def _lookup(config: Mapping[str, Any], key: str) -> list[Any]:
    """Return [value] of a dotted key, [] where there is none."""
    if key in config:
        return [config[key]]
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return []
        value = value[part]
    return [value]
