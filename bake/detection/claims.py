"""What a bake.json says beside what the weights say; it is nobody's word but the suspect's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bake.anatomy.base import Base
from bake.card.ablation import is_ablation
from bake.checkpoint.download import download_record
from bake.detection.findings import Detection
from bake.errors import BakeError
from bake.io.output_files import DIRECTION_FILE, RESULT_FILE
from bake.pipeline.record import read_any_result, rebuild_push
from bake.support.text import list_numbers

LIE = 0.05  # of a push's length


def find_lies(opened: Base, found: Detection) -> Iterator[str]:
    """Yield what a bake.json beside the suspect says and its weights do not."""
    checkpoint = opened.checkpoint
    directory = checkpoint.directory
    if not (directory / RESULT_FILE).is_file():
        return
    try:
        if checkpoint.headers_only and checkpoint.revision:
            directory = download_record(checkpoint.model_id, checkpoint.revision, DIRECTION_FILE)
        recorded = read_any_result(directory)
        claimed = None if is_ablation(recorded) else rebuild_push(recorded, directory)
    except BakeError as error:
        yield f"it cannot be read ({error})"
        return
    if ("ablation" in recorded) != bool(found.ablations) and found.base is not None:
        said = "something was taken out" if "ablation" in recorded else "nothing was taken out"
        yield f"it says that {said}"
    if claimed is None:
        if found.pushes and "site" not in recorded:
            yield "it names no push, and there is one"
        return
    push = next((each for each in found.pushes if each.site == recorded["site"]), None)
    if push is None:
        if found.base is not None:
            yield f"it says m = {claimed.multiplier:g} at {recorded['site']}, and there is no such push"
        return
    layers = sorted(claimed.vectors)
    if layers != sorted(push.vectors):
        yield (
            f"it names layers {list_numbers(layers)}, and layers {list_numbers(sorted(push.vectors))} are "
            "pushed"
        )
    for layer in sorted({*layers} & {*push.vectors}):
        wanted, own = claimed.vectors[layer].double(), push.vectors[layer]
        if (wanted - own).norm() > LIE * wanted.norm():
            yield (
                f"in layer {layer} it names a push of length {float(wanted.norm()):.4g}, and the weights "
                f"hold one of {float(own.norm()):.4g}, cosine {_cosine(wanted, own):.4f}"
            )
            return


def _cosine(left: Any, right: Any) -> float:
    return float(left @ right / (left.norm() * right.norm()))
