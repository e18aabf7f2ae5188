"""Back to the base, and to another strength: `bake undo` and `bake rescale`.

A bake keeps every weight of its base: unchanged, patched with the old value in `originals.safetensors`,
renamed, or split. Undoing is editing a bake back; rescaling is folding the recorded push into its slots
once more. Both need nothing but the bake's own directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.card.render import card_words_of_record, draw_figures
from bake.checkpoint.checkpoint import Checkpoint, find_bake, open_checkpoint
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.edits import REMOVED, Drop, Edit, Patch, Rename, Transform
from bake.checkpoint.index import INDEX_FILE
from bake.checkpoint.licences import NOTICE_FILE
from bake.checkpoint.writer import copy_companions, write_weights
from bake.errors import BakeError, CheckpointError
from bake.io.copy import copy_file, write_all
from bake.io.foreign_paths import resolve_name
from bake.io.output_files import ORIGINALS_FILE, RESULT_FILE
from bake.io.safetensors import TensorEntry, encode_header, encode_tensor, read_header
from bake.io.staging import changed_directory, staged_directory
from bake.pipeline.completion import Unproven, check_shards, is_unproven, write_record
from bake.pipeline.record import read_result, rebuild_push
from bake.sites import Slot
from bake.support.progress import warn
from bake.texts.tokenizer import TOKENIZER_CONFIG

if TYPE_CHECKING:
    import torch

    from bake.strength.coefficients import Push


@dataclass(frozen=True)
class Undone:
    """What `bake undo` wrote."""

    output: Path
    base: str
    tensors: int
    restored: tuple[str, ...]
    dropped: int
    whole_files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output),
            "base": self.base,
            "tensors": self.tensors,
            "restored": list(self.restored),
            "dropped": self.dropped,
            "whole_files": list(self.whole_files),
        }


def read_record(directory: Path) -> dict[str, Any]:
    """Read `bake.json`; raise CheckpointError where it does not say how the bake is undone, or where
    the bake is a thin one that lacks shards.
    """
    recorded = read_result(directory)
    check_shards(directory, recorded)
    if "undo" not in recorded:
        raise CheckpointError(
            f"{directory.name} was made by a version of bake that did not record how to undo it; "
            f"its base is {recorded['base']['id']}"
        )
    return recorded


def undo(
    model: str, output: Path, *, revision: str | None = None, overwrite: bool = False
) -> Undone:
    """Write the base of a baked directory or Hub id: its weights, config and tokenizer.

    Tensors come back byte for byte; so do the weight files, unless the bake rewrote them. Raises
    CheckpointError where the bake cannot be read or a tensor of the base is not in it any more.
    """
    directory = find_bake(model, revision)
    recorded = read_record(directory)
    _check_nothing_lost(recorded)
    checkpoint = open_checkpoint(str(directory))
    how = recorded["undo"]
    originals = _read_originals(checkpoint)
    edits = _undoing_edits(checkpoint, recorded, originals)
    with staged_directory(output, overwrite=overwrite, base_directory=checkpoint.source) as staging:
        written = write_weights(checkpoint, edits, staging)
        (staging / ORIGINALS_FILE).unlink(missing_ok=True)
        names = {
            file.name: how["files"][file.base_file]
            for file in written.files
            if file.base_file in how["files"]
        }
        _rename_files(staging, names)
        _write_index(staging, checkpoint, names, indexed=how["indexed"])
        (staging / "config.json").write_text(base_config_text(checkpoint, recorded), "utf-8")
        copy_companions(checkpoint, staging, drafts=True)
        _restore_companions(staging, how.get("companions", {}), directory / RESULT_FILE)
        if (recorded.get("licence") or {}).get("notice"):  # Then it is bake's, not the base's.
            (staging / NOTICE_FILE).unlink(missing_ok=True)
        _restore_tokenizer(staging / TOKENIZER_CONFIG, how["tokenizer_class"])
        whole = tuple(
            names[file.name]
            for file in written.files
            if file.name in names and file.action in ("kept", "patched")
        )
    dropped = sum(isinstance(edit, Drop) for edit in edits)
    tensors = len(checkpoint.tensors) - dropped
    return Undone(output, recorded["base"]["id"], tensors, tuple(originals), dropped, whole)


def _restore_tokenizer(path: Path, before: list[Any] | None) -> None:
    """Take back what was written into tokenizer_config.json, or the file where it was made for that."""
    if before is None:
        return
    value = before[0] if before else REMOVED
    text = edit_json(path.read_text(encoding="utf-8"), {"tokenizer_class": value})
    path.unlink()
    if json.loads(text):
        path.write_text(text, encoding="utf-8", newline="")


def _restore_companions(
    staging: Path, before: Mapping[str, Mapping[str, Any]], source: Path
) -> None:
    """Put back what named code in the files of tokenizer and processor; source: for messages."""
    for name, keys in before.items():
        path = resolve_name(staging, name, source, suffixes=".json")
        text = edit_json(path.read_text(encoding="utf-8"), keys)
        path.unlink()
        path.write_text(text, encoding="utf-8", newline="")


def _check_nothing_lost(recorded: Mapping[str, Any]) -> None:
    lost = recorded["undo"]["lost"]
    if lost:
        base = recorded["base"]
        at = f" at revision {base['revision']}" if base.get("revision") else ""
        raise CheckpointError(
            f"{lost[0]} (and {len(lost) - 1} more) cannot be undone: the bake changed its values "
            f"(route {recorded['route']}, dtype {recorded['plan']['dtype']}); take the base itself, "
            f"{base['id']}{at}"
        )


def _read_originals(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    path = checkpoint.directory / ORIGINALS_FILE
    if not path.is_file():
        return {}
    return {entry.name: entry for entry in read_header(path, ORIGINALS_FILE).tensors}


def _undoing_edits(
    checkpoint: Checkpoint, recorded: Mapping[str, Any], originals: Mapping[str, TensorEntry]
) -> list[Edit]:
    how = recorded["undo"]
    old = replace(checkpoint, tensors=dict(originals))
    edits: list[Edit] = [Drop(name) for name in recorded["plan"]["added"]]
    edits += [Patch(name, old.read(name)) for name in originals]
    edits += [Rename(new, base) for new, base in how["renamed"].items()]
    for base, joined in how["joined"].items():
        first, *others = joined["parts"]
        edits.append(_join(checkpoint, base, first, others, tuple(joined["shape"])))
        edits += [Drop(name) for name in others]
    return edits


def _join(
    checkpoint: Checkpoint, base: str, first: str, others: Sequence[str], shape: tuple[int, ...]
) -> Transform:
    def function(tensor: Any) -> dict[str, Any]:
        import torch

        return {base: torch.cat([tensor, *(checkpoint.read(name) for name in others)])}

    return Transform(first, {base: shape}, function)


def _rename_files(folder: Path, names: Mapping[str, str]) -> None:
    """Rename files, by way of names that nothing has."""
    for name in names:
        (folder / name).rename(folder / f".{name}.renaming")
    for name, wanted in names.items():
        (folder / wanted).parent.mkdir(parents=True, exist_ok=True)
        (folder / f".{name}.renaming").rename(folder / wanted)


def _write_index(
    folder: Path, checkpoint: Checkpoint, names: Mapping[str, str], *, indexed: bool
) -> None:
    path = folder / INDEX_FILE
    index = json.loads(path.read_text(encoding="utf-8"))
    if not indexed:
        path.unlink()
        return
    index["weight_map"] = {
        tensor: names.get(file, file) for tensor, file in index["weight_map"].items()
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_config_text(checkpoint: Checkpoint, recorded: Mapping[str, Any]) -> str:
    """Return the base's config.json, from the bake's and the record of what was changed."""
    changes = {
        key: before[0] if before else REMOVED for key, before in recorded["undo"]["config"].items()
    }
    return edit_json(checkpoint.config_text, changes)


@dataclass(frozen=True)
class Rescaled:
    """What `bake rescale` did: which files have new bytes."""

    directory: Path
    multiplier: float
    before: float
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "directory": str(self.directory),
            "multiplier": self.multiplier,
            "before": self.before,
            "files": list(self.files),
        }


def rescale(directory: Path, multiplier: float, *, revision: str | None = None) -> Rescaled:
    """Give a baked directory another strength: new bytes for the slots, and nothing else is moved.

    The weights are those of a fresh export at that multiplier, bit for bit. The proof was of another
    strength, so the directory says "not verified" until `bake verify` has run. All of it changes or
    nothing, see `staging.changed_directory`. revision: the branch that it will be published as, for the
    card. Raises CheckpointError where the bake cannot be read, OutputError where it cannot be written.
    """
    with changed_directory(directory) as staging:
        recorded = read_record(directory)
        checkpoint = open_checkpoint(str(directory))
        strength = plan_strength(checkpoint, recorded, multiplier)
        if strength.push.warning:
            warn(strength.push.warning)
        patched = _patch_shards(checkpoint, strength, staging)
        extra = _write_extra_shards(checkpoint, recorded, strength, staging)
        draw_figures(staging, strength.push, recorded["site"], recorded["direction"]["metadata"])
        known = {name: entry["sha256"] for name, entry in recorded["files"].items()}
        record = _rescaled_record(recorded, strength.push, revision)
        write_record(staging, directory, record, card_words_of_record(recorded), known=known)
    return Rescaled(directory, multiplier, float(recorded["multiplier"]), (*patched, *extra))


def _rescaled_record(
    recorded: Mapping[str, Any], push: Push, revision: str | None
) -> dict[str, Any]:
    """Return `bake.json`, without its files, of the same bake at another strength."""
    # The choice of a multiplier was for another strength, as a sweep's samples were.
    stale = ("files", "equivalence", "multiplier_choice", "repo_id", "revision")
    record = {key: value for key, value in recorded.items() if key not in stale}
    record |= push.to_dict() | ({"revision": revision} if revision else {})
    if "sweep" in record:
        record["sweep"] = {**record["sweep"], "samples": []}
    proof = recorded["equivalence"]
    if not is_unproven(recorded):
        reason = f"the strength was changed from m = {recorded['multiplier']:g} after the proof"
        proof = Unproven(bool(proof.get("rounding_allowed")), reason).to_dict()
    return {**record, "equivalence": proof}


@dataclass(frozen=True)
class Strength:
    """A bake's push and slots at another multiplier. slots: {name on disk: what it holds}."""

    push: Push
    new: Mapping[str, torch.Tensor]
    patched: Mapping[str, torch.Tensor]


def plan_strength(
    checkpoint: Checkpoint, recorded: Mapping[str, Any], multiplier: float
) -> Strength:
    """Fold a bake's push again at another multiplier, from its own files alone."""
    import torch

    push = _check_multiplier(rebuild_push(recorded, checkpoint.directory), multiplier)
    view = replace(checkpoint, tensors={**checkpoint.tensors, **_read_originals(checkpoint)})
    vectors = push.vectors
    new: dict[str, torch.Tensor] = {}
    patched: dict[str, torch.Tensor] = {}
    for entry in recorded["plan"]["slots"]:
        name, stored = entry["name"], checkpoint.read(entry["name"])
        slot = Slot(
            name,
            entry["weight"],
            entry["transposed"],
            entry["scale"],
            solved=entry.get("solved", False),
            axis=entry["axis"],
            span=tuple(entry["span"]) if entry["span"] else None,
        )
        if entry["through_weight"] and slot.weight is None:
            raise BakeError(
                f"{name} is folded through a matrix that is not stored as it is (quantised, or made of "
                f"several tensors), so its strength cannot be changed here; export again"
            )
        if not entry["is_new"] and "ablation" in recorded:
            raise BakeError(
                f"{name} lost a part before it was pushed, and what is left of it is not kept; export again"
            )
        weight = view.read(slot.weight) if slot.weight else None
        if entry["is_new"] and entry["old"] is None:
            raise BakeError(f"{name} does not say what it holds without a push; export again")
        old = (
            torch.full_like(stored, entry["old"], dtype=torch.float64)
            if entry["is_new"]
            else view.read(name).double()
        )
        delta = slot.delta(vectors[entry["layer"]], weight, tuple(stored.shape))
        value = (old + delta).to(stored.dtype)
        if not value.isfinite().all():
            raise BakeError(
                f"multiplier {multiplier:g} is more than {name} can hold in {stored.dtype}; give one "
                f"nearer to 1"
            )
        (new if entry["is_new"] else patched)[name] = value
    return Strength(push, new, patched)


def _check_multiplier(push: Push, multiplier: float) -> Push:
    if multiplier == 0 or not math.isfinite(multiplier):
        raise BakeError(
            f"multiplier {multiplier:g}: it must be finite and not zero; bake undo gives the base back"
        )
    return push.at(multiplier)


def _patch_shards(checkpoint: Checkpoint, strength: Strength, staging: Path) -> list[str]:
    """Write copies of the patched shards, with the slots' new bytes in them; return their names."""
    places: dict[str, dict[int, bytes]] = {}
    for name, value in strength.patched.items():
        entry = checkpoint.entry(name)
        places.setdefault(entry.file, {})[entry.start] = bytes(encode_tensor(value))
    for file, patches in places.items():
        copy_file(checkpoint.directory / file, _new_path(staging, file))
        with (staging / file).open("r+b", buffering=0) as stream:
            for start, data in patches.items():
                stream.seek(start)
                write_all(stream, memoryview(data))
    return list(places)


def _write_extra_shards(
    checkpoint: Checkpoint, recorded: Mapping[str, Any], strength: Strength, staging: Path
) -> list[str]:
    """Write the shards of the new tensors again; return their names."""
    shards = list(dict.fromkeys(checkpoint.entry(name).file for name in recorded["plan"]["added"]))
    for file in shards:
        header = checkpoint.headers[file]
        data = bytearray(encode_header(header.tensors, header.metadata))
        for entry in header.tensors:
            changed = strength.new.get(entry.name)
            data += checkpoint.read_bytes(entry.name) if changed is None else encode_tensor(changed)
        _new_path(staging, file).write_bytes(data)
    return shards


def _new_path(staging: Path, name: str) -> Path:
    """Return the path of a file to be, its folder made."""
    (staging / name).parent.mkdir(parents=True, exist_ok=True)
    return staging / name
