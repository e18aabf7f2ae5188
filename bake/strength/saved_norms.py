"""A saved calibration: the file that `bake calibrate` wrote takes the place of measuring.

It is believed only where it fits: the same base, site, statistic and hidden size, and a norm for every
layer that is pushed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bake.errors import BakeError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import expand_user
from bake.strength.norms import ActivationNorms


def read_calibration(path: Path) -> dict[str, Any]:
    """Return what a calibration file holds; raise BakeError where it is none."""
    values: dict[str, Any] = read_json(
        expand_user(path), error=BakeError, remedy="measure it with bake calibrate"
    )
    return values


def read_norms(
    path: Path,
    *,
    base: Mapping[str, Any],
    site: str,
    statistic: str,
    hidden_size: int,
    layers: Sequence[int],
) -> ActivationNorms:
    """Return the norms of `layers` from a file; base: {"id", "revision"} of the model to be baked.

    Raises BakeError, in one line, for a file that cannot be read or was measured on something else.
    """
    values = read_calibration(path)
    try:
        norms = ActivationNorms.from_dict(values)
    except BakeError as error:
        raise BakeError(f"{path}: {error}; measure it with bake calibrate") from None
    measured_on = values.get("base")
    if not isinstance(measured_on, dict):
        raise BakeError(f"the calibration {path} does not say on which base it was measured")
    remedy = "measure it with bake calibrate"
    for what, found, wanted in (
        ("the base", measured_on.get("id"), base["id"]),
        ("the base's revision", measured_on.get("revision"), base["revision"]),
        ("the site", norms.site, site),
        ("the hidden size", norms.hidden_size, hidden_size),
    ):
        if found != wanted:
            raise BakeError(
                f"the calibration {path} does not fit: {what} is {wanted} here and {found} there; "
                f"{remedy}"
            )
    if norms.statistic != statistic:
        raise BakeError(
            f"the calibration {path} chose the {norms.statistic}; give --statistic {norms.statistic}, "
            f"or {remedy} --statistic {statistic}"
        )
    by_layer = {entry.layer: entry for entry in norms.layers}
    for layer in layers:
        if layer not in by_layer:
            raise BakeError(f"the calibration {path} has no norm of layer {layer}; {remedy}")
    return replace(norms, layers=tuple(by_layer[layer] for layer in layers))
