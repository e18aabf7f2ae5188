"""`bake reproduce`: build a bake again from its `bake.json` and its base, and compare every file.

The recorded coefficients and directions decide, so nothing is measured and no model runs; what a fresh
calibration would give is said on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base, load_base, open_base
from bake.card.ablation import is_ablation
from bake.card.render import draw_figures, render_record
from bake.checkpoint.checkpoint import find_bake
from bake.checkpoint.licences import write_notice
from bake.checkpoint.writer import copy_companions, write_config, write_weights
from bake.errors import CheckpointError, EquivalenceError, PromptError
from bake.io.hashing import hash_files
from bake.io.output_files import CARD_FILE, DIRECTION_FILE, MEANS_FILE, RESULT_FILE
from bake.io.work_directory import scratch_directory
from bake.models.streaming import Placement
from bake.pipeline.ablation_record import rebuild_ablation
from bake.pipeline.completion import check_shards, is_thin
from bake.pipeline.record import (
    base_name,
    base_revision,
    encode_result,
    read_any_result,
    rebuild_plan,
    rebuild_push,
)
from bake.plan.plan import Changes
from bake.strength.norms import measure_norms
from bake.support.progress import announce
from bake.texts.prompts import identify_prompts, read_prompts
from bake.texts.tokenizer import keep_tokenizer

_SAME_NORMS = 5e-5  # relative; two machines' kernels differ by less


@dataclass(frozen=True)
class Reproduction:
    """What building again gave: files whose bytes are the same, and those that are not.

    fresh_norms: {layer: (recorded μ, measured again)} where that was asked for.
    """

    directory: Path
    base: str
    same: tuple[str, ...]
    differing: tuple[str, ...]
    fresh_norms: Mapping[int, tuple[float, float]] | None = None

    @property
    def identical(self) -> bool:
        """Whether every file came out byte for byte."""
        return not self.differing

    @property
    def drift(self) -> float | None:
        """The largest relative difference between recorded and fresh norms."""
        if self.fresh_norms is None:
            return None
        return max(abs(fresh - old) / old for old, fresh in self.fresh_norms.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "directory": str(self.directory),
            "base": self.base,
            "identical": self.identical,
            "same": list(self.same),
            "differing": list(self.differing),
            "drift": self.drift,
        }

    def raise_if_different(self) -> None:
        """Raise EquivalenceError naming the first file that came out differently."""
        if self.differing:
            more = f" and {len(self.differing) - 1} more" if len(self.differing) > 1 else ""
            raise EquivalenceError(
                f"not reproduced: {self.differing[0]}{more} came out with other bytes than in "
                f"{self.directory.name}; was the base another one, or the directory changed?"
            )


def reproduce(
    model: str,
    *,
    revision: str | None = None,
    base: str | None = None,
    calibrate: str | bool = False,
    placement: Placement | None = None,
) -> Reproduction:
    """Build a baked directory or Hub id again in a temporary directory, and compare the files.

    base: path or Hub id; as recorded where it is left out. calibrate: a prompt file or set to measure the
    norms on once more, True for the set that the bake names, to say whether a fresh calibration would
    differ. Raises CheckpointError where the bake or its base cannot be read, PromptError where the bake
    was calibrated on a file and none is given.
    """
    directory = find_bake(model, revision)
    recorded = read_any_result(directory)
    check_shards(directory, recorded)
    if is_thin(recorded):
        raise CheckpointError(
            f"{directory} is a thin bake that has not been proven yet: run bake verify {directory} first"
        )
    prompts = find_prompts(recorded, calibrate) if calibrate else None
    opened = open_base(base or base_name(recorded, directory), base_revision(recorded, base))
    plan, draw = _rebuild(recorded, opened, directory)
    with scratch_directory(directory, ".bake-reproduce-") as again:
        write_weights(opened.checkpoint, plan.edits, again)
        write_config(opened.checkpoint, plan.config_changes, again)
        copy_companions(opened.checkpoint, again, drafts=plan.carries_drafts)
        write_notice(recorded.get("licence") or {}, again)
        keep_tokenizer(opened.tokenizer, again)
        draw(again)
        # Directions and a sweep's figures are data, as they are.
        taken = [entry["file"] for entry in recorded.get("removed", ())]
        for name in (
            DIRECTION_FILE,
            MEANS_FILE,
            *taken,
            *recorded.get("sweep", {}).get("figures", ()),
        ):
            if (directory / name).is_file():
                (again / name).write_bytes((directory / name).read_bytes())
        record = {key: value for key, value in recorded.items() if key != "files"}
        card = render_record(record)
        (again / CARD_FILE).write_text(card, encoding="utf-8")
        built = hash_files(again)
        text = encode_result({**record, "files": built})
    expected = recorded["files"]
    names = sorted({*expected, *built})
    wrong = [
        name
        for name in names
        if name not in built
        or name not in expected
        or built[name]["sha256"] != expected[name]["sha256"]
    ]
    if text != (directory / RESULT_FILE).read_text(encoding="utf-8"):
        wrong.append(RESULT_FILE)
    same = [name for name in (*names, RESULT_FILE) if name not in wrong]
    fresh = _measure(opened, recorded, prompts, placement) if prompts else None
    return Reproduction(directory, opened.checkpoint.model_id, tuple(same), tuple(wrong), fresh)


def _rebuild(
    recorded: Mapping[str, Any], opened: Base, directory: Path
) -> tuple[Changes, Callable[[Path], None]]:
    """Return the plan of a push or of an ablation, and what draws its figures into a directory."""
    if is_ablation(recorded):
        return rebuild_ablation(recorded, opened, directory), lambda _again: None
    push = rebuild_push(recorded, directory)
    site, metadata = recorded["site"], recorded["direction"]["metadata"]
    plan = rebuild_plan(recorded, opened, push, directory)
    return plan, lambda again: draw_figures(again, push, site, metadata)


def find_prompts(recorded: Mapping[str, Any], given: str | bool) -> list[str]:
    """Return the texts for a fresh calibration; say where they are others than the bake's own."""
    if is_ablation(recorded):
        raise PromptError(
            "an ablation is measured on no calibration prompts: leave --calibrate out"
        )
    texts = recorded["calibration"].get("texts") or {}
    name = texts.get("set") if given is True else str(given)
    if name is None:
        raise PromptError(
            "bake.json names no set of bake's own that the norms were measured on; give the prompts of the "
            "bake with --calibrate FILE"
        )
    prompts = read_prompts(name)
    if texts and identify_prompts(name, prompts)["sha256"] != texts["sha256"]:
        announce(f"{name} holds other texts than those that the bake was calibrated on")
    return prompts


def _measure(
    opened: Base, recorded: Mapping[str, Any], prompts: Sequence[str], placement: Placement | None
) -> dict[int, tuple[float, float]]:
    layers = {int(entry["layer"]): float(entry["activation_norm"]) for entry in recorded["layers"]}
    loaded = load_base(opened, placement)
    norms = measure_norms(
        loaded,
        recorded["site"],
        loaded.batches(prompts),
        sorted(layers),
        statistic=recorded["calibration"].get("statistic", "mean"),
    ).values()
    return {layer: (mu, norms[layer]) for layer, mu in layers.items()}


def describe(found: Reproduction) -> str:
    """Return what a person reads."""
    lines = [f"{found.directory.name}, built again from {found.base}:"]
    lines += [f"  same bytes: {name}" for name in found.same]
    lines += [f"  DIFFERENT: {name}" for name in found.differing]
    if found.drift is not None:
        differs = found.drift >= _SAME_NORMS
        how = (
            f"would differ from the recorded norms by up to {found.drift:.2%}"
            if differs
            else ("gives the recorded norms")
        )
        lines.append(f"a fresh calibration {how}; the recorded coefficients were used")
    return "\n".join(lines)
