"""The suspect without what was found in it: `bake detect … --undo DIR`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.edits import REMOVED, Drop, Edit, Patch
from bake.checkpoint.ranged import RangedTensors
from bake.checkpoint.writer import copy_companions, write_config, write_weights
from bake.detection.findings import LAYERS, Detection
from bake.errors import BakeError, UnsupportedError
from bake.io.output_files import ORIGINALS_FILE
from bake.io.safetensors import torch_dtype
from bake.io.shipped import find_model
from bake.io.staging import staged_directory
from bake.lifecycle.diff import compare_json


def check_undoable(found: Detection) -> None:
    """Raise where the suspect cannot be written without what was found in it."""
    if not found.pushes and not found.ablations:
        raise BakeError("nothing was found, so there is nothing to undo")
    if found.rewritten_as is not None:
        raise UnsupportedError(
            f"the base was written as {found.rewritten_as} before it was pushed: without the push it is "
            f"the base, so take {found.base} itself"
        )
    if found.base is None and any(push.step or push.kind == LAYERS for push in found.pushes):
        raise UnsupportedError(
            "what was there before the push is not known without the base: give it with --base"
        )
    if found.ablations and found.base is None:
        raise UnsupportedError(
            "what was taken out is not in the weights any more: give the model that has it with --base"
        )


def write_without(
    found: Detection,
    suspect: str,
    revision: str | None,
    output: Path,
    base: Base | None,
    flags: Mapping[str, Any],
    check: Callable[[Path], None],
) -> None:
    """Write the suspect without the tensors and values that the finding explains.

    base: whose values come back; without one the tensors were created and go. flags: config keys that
    created them, with what they were. What else differs from the base is left as it is. check: raises for
    what may not be written, before it is in its place.
    """
    opened = open_checkpoint(find_model(suspect), revision=revision)
    origin = None if base is None else RangedTensors(base.checkpoint)
    edits: list[Edit] = []
    for name in found.explained:
        if origin is not None and name in origin.checkpoint.tensors:
            dtype = torch_dtype(opened.entry(name).dtype)
            edits.append(Patch(name, origin.read(name).to(dtype)))
        else:
            edits.append(Drop(name))
    changes = dict(flags)
    if base is not None:
        for key, (old, new) in compare_json(base.checkpoint.config, opened.config):
            if isinstance(new, bool):
                changes[key] = old if isinstance(old, bool) else REMOVED
    with staged_directory(output, base_directory=opened.source) as staging:
        write_weights(opened, edits, staging)
        (staging / ORIGINALS_FILE).unlink(missing_ok=True)
        write_config(opened, changes, staging)
        copy_companions(opened, staging, drafts=True)
        check(staging)
