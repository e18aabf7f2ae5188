"""What llama.cpp's converter is given: a bake without the zeros that its loader has no place for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake.anatomy import examine
from bake.anatomy.flags import unusual_biases
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Drop
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.writer import copy_companions, write_config, write_weights
from bake.models.forward import read_config


def write_source(checkpoint: Checkpoint, directory: Path) -> int:
    """Write a checkpoint for the converter; return how many biases of zeros were left out.

    Only biases that the family does not have by itself go: adding zero is nothing, and llama.cpp refuses a
    file with a tensor that its code for the family does not ask for.
    """
    anatomy = examine(read_config(checkpoint.directory))
    names = DiskNames(checkpoint, build_on_meta(anatomy.config))
    created = [
        name for each in unusual_biases(anatomy.config) if (name := names.find(each)) is not None
    ]
    zeros = [name for name in created if not checkpoint.read(name).any()]
    directory.mkdir()
    write_weights(checkpoint, [Drop(name) for name in zeros], directory)
    write_config(checkpoint, {}, directory)
    copy_companions(checkpoint, directory)
    return len(zeros)


def write_metadata(recorded: Mapping[str, Any], name: str, path: Path) -> None:
    """Write what the GGUF's metadata says of a bake, in the converter's form; the rest is the card's."""
    base = (recorded.get("base") or {}).get("id") or "its base"
    parts = [f"{base}, steered by bake"]
    if "site" in recorded:
        layers = [entry["layer"] for entry in recorded.get("layers", ())]
        parts.append(
            f"a direction at {recorded['site']} of layers {min(layers)} to {max(layers)}, law "
            f"{recorded.get('law')}, m = {recorded.get('multiplier'):g}"
        )
    if "ablation" in recorded:
        parts.append("a direction taken out of its weights")
    values = {
        "general.name": name,
        "general.description": ": ".join((parts[0], "; ".join(parts[1:]))),
    }
    path.write_text(json.dumps(values), "utf-8")
