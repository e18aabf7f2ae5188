"""A ladder of strengths: one repository, a branch for each, and of the weights only the slots are sent.

Users then write `from_pretrained(repo, revision="m1.5")`. A branch starts at main's commit, so that all
that differs there is the shard of the new tensors (and patched ones), the card and `bake.json`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.errors import BakeError, CheckpointError
from bake.hub.manifest import read_manifest
from bake.hub.publication import Publication
from bake.io.hashing import list_files
from bake.io.work_directory import scratch_directory
from bake.lifecycle.rescale import read_record, rescale
from bake.lifecycle.verify import verify
from bake.pipeline.completion import is_thin
from bake.pipeline.publishing import publish_directory
from bake.pipeline.record import base_name
from bake.support.progress import warn


@dataclass(frozen=True)
class PublishedStrengths:
    """The bake itself on main, and one publication for each strength: {multiplier: publication}."""

    main: Publication
    branches: dict[float, Publication]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        branches = {branch_of(m): found.to_dict() for m, found in self.branches.items()}
        return {**self.main.to_dict(), "strengths": branches}

    def describe(self) -> str:
        """Return what a person reads."""
        lines = [self.main.describe()]
        for multiplier, found in self.branches.items():
            state = "verified" if found.proven else "not verified, and its card says so"
            lines.append(
                f"m = {multiplier:g}: revision {branch_of(multiplier)}, "
                f"{found.uploaded / 1e6:.1f} MB, {state}"
            )
        return "\n".join(lines)


def branch_of(multiplier: float) -> str:
    """Return the branch of a strength: m1.5."""
    return f"m{multiplier:g}"


def parse_strengths(text: str) -> list[float]:
    """Read "0.5,1,1.5"; raise BakeError for what are no multipliers, none of them twice."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise BakeError(f"--strengths {text} is no list of multipliers such as 0.5,1,1.5") from None
    if len({branch_of(m) for m in found}) < len(found):
        raise BakeError(f"--strengths {text} names a strength twice")
    return found


def publish_strengths(
    directory: Path,
    repo_id: str,
    strengths: Sequence[float],
    *,
    base: str | None = None,
    **options: Any,
) -> PublishedStrengths:
    """Publish a baked directory on main, and each strength on a branch of its own.

    Every strength is proven before it is sent where the base is at hand: `base`, or the Hub id in
    bake.json. Otherwise its card says that it was not verified. options: as `publish` takes them. Raises
    what `publish`, `rescale` and `verify` raise; what was published before that stays.
    """
    recorded = read_record(directory)
    if is_thin(recorded):
        raise BakeError(
            f"{directory} is a thin bake, whose strength cannot be changed without its shards: put them "
            "beside it and run bake verify, or export thin at each multiplier and publish with --revision"
        )
    proven = read_manifest(directory).proven
    known = _base_at_hand(recorded, directory, base) if proven else False
    if not known:
        warn(
            "the strengths are not verified, and their cards say so: the base was a local directory; "
            "name it with --base"
        )
    # Made first: what cannot be rescaled is found before anything is sent.
    with scratch_directory(directory, ".bake-strengths-") as folder:
        made = {}
        for multiplier in strengths:
            made[multiplier] = directory
            if multiplier != recorded["multiplier"]:
                made[multiplier] = folder / directory.resolve().name / branch_of(multiplier)
                _make_strength(directory, made[multiplier], multiplier)
                if known:
                    verify(made[multiplier], base).equivalence.raise_if_failed()
        main = publish_directory(directory, repo_id, **options)
        branches = {
            multiplier: publish_directory(
                path,
                main.repo_id,
                revision=branch_of(multiplier),
                unproven_allowed=True,
                **_with_message(options, multiplier),
            )
            for multiplier, path in made.items()
        }
    return PublishedStrengths(main, branches)


def _make_strength(directory: Path, target: Path, multiplier: float) -> None:
    """Copy a bake, its shards as hard links where the file system has them, and rescale it.

    Rescaling writes into no file that is there, so the bake's own shards stay as they are.
    """
    for name in list_files(directory):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            _link((directory / name).resolve(), target / name)
        else:
            shutil.copyfile(directory / name, target / name)
    rescale(target, multiplier, revision=branch_of(multiplier))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _with_message(options: dict[str, Any], multiplier: float) -> dict[str, Any]:
    message = options.get("commit_message") or "Publish the baked model"
    return {**options, "commit_message": f"{message} at m = {multiplier:g}"}


def _base_at_hand(recorded: dict[str, Any], directory: Path, base: str | None) -> bool:
    if base is not None:
        return True
    try:
        base_name(recorded, directory)
    except CheckpointError:
        return False
    return True
