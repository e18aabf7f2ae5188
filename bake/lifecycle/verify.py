"""Verify a directory that bake made: rebuild the plan from `bake.json` and prove it again.

Nothing in the directory is believed: the push is computed from the recorded coefficients and
`direction.safetensors`, folded again from the base's own weights, and compared bit for bit with what is
stored; every other tensor must be the base's; then hooked and baked outputs are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base, open_base
from bake.card.ablation import is_ablation
from bake.card.render import card_words_of_record
from bake.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bake.checkpoint.edits import Add, Change, Merge, Patch, Rename, Transform
from bake.checkpoint.layout import compute
from bake.io.hashing import hash_files
from bake.io.output_files import RESULT_FILE
from bake.io.safetensors import encode_tensor, spec_of
from bake.models.streaming import Placement
from bake.pipeline.ablation_record import rebuild_ablation
from bake.pipeline.completion import check_shards, is_unproven, record_proof
from bake.pipeline.record import (
    base_name,
    base_revision,
    read_any_result,
    rebuild_plan,
    rebuild_push,
)
from bake.plan.plan import Changes
from bake.proof.ablation import prove_ablation
from bake.proof.equivalence import Equivalence
from bake.proof.prove import prove
from bake.support.progress import announce

CHUNK = 64 * 1024 * 1024  # bytes compared at a time


@dataclass(frozen=True)
class Verification:
    """What `bake verify` found: the proof, and what else differs from what bake wrote."""

    directory: Path
    base: str
    equivalence: Equivalence

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "directory": str(self.directory),
            "base": self.base,
            "equivalence": self.equivalence.to_dict(),
        }


def verify(
    directory: Path,
    base: str | None = None,
    placement: Placement | None = None,
    *,
    record: bool = True,
    published: tuple[str, str] | None = None,
) -> Verification:
    """Prove a baked directory again. The result's failures say what is wrong.

    record: note in the directory that a thin or rescaled bake is proven, when it is. published:
    (repository, commit) on the Hub whose files these are; the plain process loads it by its id.

    base: path or Hub id; the Hub id in bake.json where it is left out. Raises CheckpointError where
    the directory was not made by bake, cannot be read, or its base is not named.
    """
    recorded = read_any_result(directory)
    check_shards(directory, recorded)
    opened = open_base(base or base_name(recorded, directory), base_revision(recorded, base))
    baked = open_checkpoint(str(directory), allowed=opened.checkpoint.roots)
    plan, found = _prove_again(opened, directory, recorded, placement, published)
    differences = [
        *compare_tensors(opened.checkpoint, baked, plan),
        *compare_files(directory, recorded),
    ]
    found = replace(found, failures=(*found.failures, *differences))
    if record and is_unproven(recorded) and found.passed:
        record_proof(directory, recorded, found, card_words_of_record(recorded))
        announce(f"{directory} is proven: bake.json and the card say so now")
    return Verification(directory, opened.checkpoint.model_id, found)


def _prove_again(
    opened: Base,
    directory: Path,
    recorded: Mapping[str, Any],
    placement: Placement | None,
    published: tuple[str, str] | None,
) -> tuple[Changes, Equivalence]:
    """Rebuild the plan of a push or of an ablation, and prove the directory by it."""
    allowed = bool(recorded["equivalence"].get("rounding_allowed"))
    if is_ablation(recorded):
        ablation = rebuild_ablation(recorded, opened, directory)
        return ablation, prove_ablation(
            opened,
            directory,
            ablation,
            allow_rounding=allowed,
            placement=placement,
            published=published,
        )
    push = rebuild_push(recorded, directory)
    plan = rebuild_plan(recorded, opened, push, directory)
    return plan, prove(opened, directory, plan, push, allowed, placement, published)


def compare_tensors(base: Checkpoint, baked: Checkpoint, plan: Changes) -> Iterator[str]:
    """Yield a phrase for what is stored and neither the base's nor the plan's.

    What the plan adds or patches is compared with the slots, bit for bit, by the proof.
    """
    changes: dict[str, Change] = {}
    for edit in plan.edits:
        if not isinstance(edit, Add | Merge):
            changes[edit.name] = edit
    names: dict[str, str] = {}  # {name in the output: name in the base} of what keeps its bytes
    computed: list[Transform | Merge] = [e for e in plan.edits if isinstance(e, Transform | Merge)]
    merged = {name for edit in computed if isinstance(edit, Merge) for name in edit.names}
    expected = {name for edit in computed for name in edit.outputs}
    expected |= {edit.name for edit in plan.edits if isinstance(edit, Add)}
    for name in base.tensors:
        change = changes.get(name)
        if name in merged:
            continue
        if change is None or isinstance(change, Rename):
            names[name if change is None else change.new_name] = name
        elif isinstance(change, Patch):
            expected.add(name)
    expected |= set(names)
    missing = sorted(expected - set(baked.tensors))
    extra = sorted(set(baked.tensors) - expected)
    present = [name for name in names if name in baked.tensors]
    differing = [name for name in present if not _same_bytes(base, names[name], baked, name)]
    differing += [name for edit in computed for name in _miscomputed(base, baked, edit)]
    for label, found in (
        ("is missing", missing),
        ("is in the checkpoint and neither the base's nor the bake's", extra),
        ("is not the base's", differing),
    ):
        if found:
            others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            yield f"tensor {found[0]}{others} {label}"


def _miscomputed(base: Checkpoint, baked: Checkpoint, edit: Transform | Merge) -> Iterator[str]:
    """Yield the outputs of an edit that are stored with other bytes than it makes of the base."""
    if not all(name in baked.tensors for name in edit.outputs):
        return  # Told as missing.
    for name, tensor in compute(base, edit).items():
        made, entry = spec_of(name, tensor), baked.tensors[name]
        same = (made.dtype, made.shape) == (entry.dtype, entry.shape)
        if not same or encode_tensor(tensor) != baked.read_bytes(name):
            yield name


def _same_bytes(base: Checkpoint, base_name: str, baked: Checkpoint, name: str) -> bool:
    left, right = base.tensors[base_name], baked.tensors[name]
    if (left.dtype, left.shape, left.size) != (right.dtype, right.shape, right.size):
        return False
    with (
        (base.directory / left.file).open("rb") as first,
        (baked.directory / right.file).open("rb") as second,
    ):
        first.seek(left.start)
        second.seek(right.start)
        for done in range(0, left.size, CHUNK):
            count = min(CHUNK, left.size - done)
            if first.read(count) != second.read(count):
                return False
    return True


def compare_files(directory: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    """Yield a phrase for files that are not what `bake.json` says."""
    found = hash_files(directory, exclude=(RESULT_FILE,))
    for name, expected in recorded["files"].items():
        if name not in found:
            yield f"file {name} is missing"
        elif found[name]["sha256"] != expected["sha256"]:
            yield f"file {name} is not what bake wrote (SHA-256 differs from bake.json)"


__all__ = ["Base", "Verification", "verify"]
