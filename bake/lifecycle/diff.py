"""`bake diff`: which tensors, config keys and files of two checkpoints differ, and by how much.

It believes neither `bake.json` nor an index: tensors are compared byte for byte, whatever file and name
they have. Of checkpoints on the Hub only headers are read, and the bytes of files whose SHA-256 differs;
so the diff of a bake and its base costs a few megabytes, whatever their size.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bake.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bake.checkpoint.ranged import equal_files, read_part
from bake.io.safetensors import decode_tensor
from bake.io.shipped import find_model
from bake.support.progress import track_bytes
from bake.support.text import list_numbers

if TYPE_CHECKING:
    import torch

Kind = Literal["added", "removed", "changed", "renamed"]
CHUNK = 32 * 1024 * 1024  # bytes compared at a time
_ABSENT = "absent"
MOST_RANKS, _HELD = 8, 0.99
_IN_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a tensor's name


@dataclass(frozen=True)
class TensorChange:
    """One tensor that is not the same in both.

    base_name: its name in the base, where it has another one. norm: ‖new‖ of an added tensor, ‖new −
    old‖ of a changed one; relative: that over ‖old‖; largest: the largest |new − old|. None where the
    values cannot be subtracted (another shape, no floats) or there is only one. rank: how many directions
    hold 99 % of a matrix's change, in squares: few for an ablation, many for a fine-tune, then None.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    base_name: str | None = None
    norm: float | None = None
    relative: float | None = None
    largest: float | None = None
    rank: int | None = None

    def describe(self) -> str:
        """Return what happened to it, in a phrase."""
        if self.kind == "renamed":
            return f"was {self.base_name}, same bytes"
        if self.kind == "added":
            return "all zero" if self.norm == 0 else f"norm {_number(self.norm)}"
        if self.kind == "removed":
            return "is not there any more"
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"moved by {_number(self.norm)}, × {_number(self.relative)} of its norm{rank}"


@dataclass(frozen=True)
class Difference:
    """What differs. config: {dotted key: (base's value, baked value)}, `absent` where there is none.

    files: {name: "added" | "removed" | "changed"} of what is neither weights nor config.json.
    """

    base: str
    baked: str
    tensors: tuple[TensorChange, ...]
    same_tensors: int
    same_bytes: int
    config: Mapping[str, tuple[Any, Any]]
    files: Mapping[str, str]

    @property
    def is_empty(self) -> bool:
        """Whether tensors and config are the same."""
        return not self.tensors and not self.config

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "base": self.base,
            "baked": self.baked,
            "same_tensors": self.same_tensors,
            "same_bytes": self.same_bytes,
            "tensors": [asdict(change) for change in self.tensors],
            "config": {key: list(values) for key, values in self.config.items()},
            "files": dict(self.files),
        }


def diff(
    base: str, baked: str, *, base_revision: str | None = None, revision: str | None = None
) -> Difference:
    """Compare two checkpoints: directories or Hub ids, whose weights stay on the Hub.

    Raises CheckpointError where one of them cannot be read.
    """
    left = open_checkpoint(find_model(base), revision=base_revision, headers_only=True)
    right = open_checkpoint(
        find_model(baked), revision=revision, headers_only=True, allowed=left.roots
    )
    return compare_checkpoints(left, right)


def compare_checkpoints(base: Checkpoint, baked: Checkpoint) -> Difference:
    """Compare two opened checkpoints; see `diff`."""
    shared = [name for name in base.tensors if name in baked.tensors]
    total = sum(base.tensors[name].size for name in shared)
    with track_bytes(total, "comparing") as progress:
        equal = equal_files(base, baked)
        changed = []
        for name in shared:
            if not _same(base, baked, name, name, equal):
                changed.append(_describe_change(base, baked, name))
            progress(base.tensors[name].size)
    gone = [name for name in base.tensors if name not in baked.tensors]
    new = [name for name in baked.tensors if name not in base.tensors]
    renamed = _match_renamed(base, baked, gone, new)
    moved = set(renamed.values())
    changes = [
        *changed,
        *(_change(baked, name, "renamed", base_name=old) for name, old in renamed.items()),
        *(_describe_added(baked, name) for name in new if name not in renamed),
        *(_change(base, name, "removed") for name in gone if name not in moved),
    ]
    kept = len(shared) - len(changed)
    altered = {change.name for change in changed}
    return Difference(
        base.model_id,
        baked.model_id,
        tuple(changes),
        kept,
        sum(base.tensors[name].size for name in shared if name not in altered),
        dict(compare_json(base.config, baked.config)),
        dict(_compare_files(base, baked)),
    )


def compare_json(
    base: Mapping[str, Any], baked: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield (dotted key, (base's value, baked value)) of every key that differs."""
    for key in dict.fromkeys([*base, *baked]):
        old, new = base.get(key, _ABSENT), baked.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from compare_json(old, new, f"{prefix}{key}.")
        elif old != new or (key in base) != (key in baked):
            yield f"{prefix}{key}", (old, new)


def _same(
    base: Checkpoint, baked: Checkpoint, old: str, new: str, equal: set[tuple[str, str]]
) -> bool:
    left, right = base.tensors[old], baked.tensors[new]
    if (left.dtype, left.shape, left.size) != (right.dtype, right.shape, right.size):
        return False
    if (left.file, right.file) in equal and left.start == right.start:
        return True
    return all(
        read_part(base, left, start, stop) == read_part(baked, right, start, stop)
        for start, stop in _pieces(left.size)
    )


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, CHUNK):
        yield start, min(start + CHUNK, size)


def _values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    entry = checkpoint.tensors[name]
    data = bytearray(read_part(checkpoint, entry, 0, entry.size))
    return decode_tensor(data, entry.dtype, entry.shape)


def _change(checkpoint: Checkpoint, name: str, kind: Kind, **more: Any) -> TensorChange:
    entry = checkpoint.tensors[name]
    return TensorChange(name, kind, entry.dtype, tuple(entry.shape), **more)


def _describe_added(baked: Checkpoint, name: str) -> TensorChange:
    values = _values(baked, name)
    norm = float(values.double().norm()) if values.is_floating_point() else None
    return _change(baked, name, "added", norm=norm)


def _describe_change(base: Checkpoint, baked: Checkpoint, name: str) -> TensorChange:
    left, right = base.tensors[name], baked.tensors[name]
    old, new = _values(base, name), _values(baked, name)
    if left.shape != right.shape or not (old.is_floating_point() and new.is_floating_point()):
        return _change(baked, name, "changed")
    moved = new.double() - old.double()
    size = float(old.double().norm())
    norm = float(moved.norm())
    relative = norm / size if size else None
    largest = float(moved.abs().max()) if moved.numel() else 0.0
    rank = _rank(moved.float(), norm) if moved.ndim == 2 and norm else None
    return _change(baked, name, "changed", norm=norm, relative=relative, largest=largest, rank=rank)


def _rank(moved: torch.Tensor, norm: float) -> int | None:
    """Return how many singular values hold `_HELD` of ‖moved‖²; None where it is more than are looked at.

    moved: (rows, columns) float32. By random projections (Halko et al., arXiv 0909.4061): a whole
    decomposition of a large matrix takes minutes.
    """
    import torch

    looked_at = min(MOST_RANKS, *moved.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = torch.svd_lowrank(moved, q=looked_at, niter=4)[1].double()
    held = (values**2).cumsum(0) / norm**2
    return next((rank for rank, share in enumerate(held.tolist(), 1) if share >= _HELD), None)


def _match_renamed(
    base: Checkpoint, baked: Checkpoint, gone: Sequence[str], new: Sequence[str]
) -> dict[str, str]:
    """Return {new name: old name} of tensors whose bytes are all there under another name.

    Only where both lie on disk: to compare names by content means to read everything.
    """
    if not all(_is_here(base, name) for name in gone) or not all(_is_here(baked, n) for n in new):
        return {}

    def shape(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]]:
        entry = checkpoint.tensors[name]
        return entry.dtype, tuple(entry.shape)

    likely = {shape(base, name) for name in gone} & {shape(baked, name) for name in new}
    by_hash: dict[str, list[str]] = {}
    for name in gone:
        if shape(base, name) in likely:
            by_hash.setdefault(_hash(base, name), []).append(name)
    found = {}
    for name in new:
        candidates = by_hash.get(_hash(baked, name)) if shape(baked, name) in likely else None
        if candidates:
            # Of equal tensors the one whose name is most alike: norms of fresh layers are all ones.
            best = max(candidates, key=lambda old: _likeness(old, name))
            candidates.remove(best)
            found[name] = best
    return found


def _likeness(left: str, right: str) -> tuple[int, int]:
    """Return how many parts of two dotted names agree, from the end and in all."""
    mine, other = left.split("."), right.split(".")
    from_end = 0
    while from_end < min(len(mine), len(other)) and mine[-1 - from_end] == other[-1 - from_end]:
        from_end += 1
    return from_end, len(set(mine) & set(other))


def _is_here(checkpoint: Checkpoint, name: str) -> bool:
    return (checkpoint.directory / checkpoint.tensors[name].file).is_file()


def _hash(checkpoint: Checkpoint, name: str) -> str:
    entry = checkpoint.tensors[name]
    digest = hashlib.sha256(f"{entry.dtype}{list(entry.shape)}".encode())
    for start, stop in _pieces(entry.size):
        digest.update(read_part(checkpoint, entry, start, stop))
    return digest.hexdigest()


def _compare_files(base: Checkpoint, baked: Checkpoint) -> Iterator[tuple[str, str]]:
    old, new = set(base.companions), set(baked.companions)
    for name in sorted(old | new):
        if name not in old:
            yield name, "added"
        elif name not in new:
            yield name, "removed"
        elif _content(base.source / name) != _content(baked.source / name):
            yield name, "changed"


def _content(path: Path) -> bytes:
    return path.read_bytes()


def describe(found: Difference, limit: int = 40) -> str:
    """Return what a person reads: config, tensors by kind, files; long lists cut at `limit`."""
    lines = [
        f"{found.base} → {found.baked}: {found.same_tensors} tensors are the same "
        f"({found.same_bytes / 1e9:.3g} GB), {len(found.tensors)} are not"
    ]
    if found.config:
        lines += ["", "config.json"]
        lines += [f"  {key}: {_value(a)} → {_value(b)}" for key, (a, b) in found.config.items()]
    for kind in ("changed", "added", "renamed", "removed"):
        chosen = [change for change in found.tensors if change.kind == kind]
        if not chosen:
            continue
        lines += ["", f"{kind}: {len(chosen)} tensors"]
        lines += [f"  {line}" for line in _grouped(chosen, limit)]
    if found.files:
        lines += ["", "other files"]
        lines += [f"  {name}: {what}" for name, what in found.files.items()]
    if found.is_empty:
        lines.append("tensors and config are the same")
    return "\n".join(lines)


def _grouped(changes: Sequence[TensorChange], limit: int) -> list[str]:
    """Return a line for every parameter that changes in several layers, and one for any other tensor.

    What is added and all zero comes first, in one line.
    """
    zero = [entry for entry in changes if entry.kind == "added" and entry.norm == 0]
    groups: dict[tuple[str, str, str], list[TensorChange]] = {}
    for entry in changes:
        if entry not in zero or len(zero) == 1:
            groups.setdefault(_alike(entry), []).append(entry)
    lines = [_describe_group(key, entries) for key, entries in groups.items()]
    if len(zero) > 1:
        lines.insert(0, _describe_zeros(zero))
    more = [f"… and {len(lines) - limit} more; see --json"] if len(lines) > limit else []
    return [*lines[:limit], *more]


def _alike(entry: TensorChange) -> tuple[str, str, str]:
    """Return what a tensor has in common with those of other layers: its name there, dtype, shape."""
    return _IN_LAYER.sub(".{layer}.", entry.name, count=1), entry.dtype, str(list(entry.shape))


def _describe_zeros(zero: Sequence[TensorChange]) -> str:
    counts = Counter(_alike(entry)[0].rpartition("{layer}.")[2] for entry in zero)
    what = "biases" if all(name.endswith(".bias") for name in counts) else "tensors"
    return f"{len(zero)} zero {what}: " + ", ".join(f"{n} × {name}" for name, n in counts.items())


def _describe_group(key: tuple[str, str, str], entries: Sequence[TensorChange]) -> str:
    pattern, dtype, shape = key
    if len(entries) == 1:
        (entry,) = entries
        return f"{entry.name} {dtype} {shape}: {entry.describe()}"
    layers = list_numbers(int(_IN_LAYER.findall(entry.name)[0]) for entry in entries)
    norms = [entry.norm for entry in entries if entry.norm is not None]
    sizes = f", norm {min(norms):.3g} to {max(norms):.3g}" if norms else ""
    ranks = sorted({str(entry.rank or f"above {MOST_RANKS}") for entry in entries if entry.norm})
    if entries[0].kind == "changed" and len(entries[0].shape) == 2:
        sizes += f", rank {' or '.join(ranks)}"
    return f"{len(entries)} × {pattern} {dtype} {shape} in layers {layers}{sizes}"


def _value(value: Any) -> str:
    return _ABSENT if value == _ABSENT else repr(value)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"
