"""`bake.json`: what was done, written so that it can be read back.

The same bake always gives the same bytes: no times, no paths. Reading back rebuilds the push from the
recorded coefficients and `direction.safetensors`, and the plan from the base; neither measures anything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bake.anatomy.base import Base
from bake.card.ablation import is_ablation
from bake.checkpoint.edits import Drop
from bake.checkpoint.left_out import LeftOut, find_left_out, is_draft
from bake.checkpoint.loading import auto_class
from bake.checkpoint.own_code import find_code_keys
from bake.checkpoint.writer import find_companion_code
from bake.directions.direction_file import load_direction
from bake.engines.survival import survivals, to_values
from bake.errors import CheckpointError, EndpointError, UnsupportedError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import check_links
from bake.io.output_files import DIRECTION_FILE, RESULT_FILE
from bake.io.shipped import DEMO_NAME
from bake.pipeline.decision import Decision
from bake.pipeline.record_shape import check_record
from bake.pipeline.taken_out import rebuild_taken_out
from bake.plan.dtypes import FLOAT_DTYPES
from bake.plan.plan import Changes, Plan, make_plan
from bake.strength.coefficients import LayerPush, Push
from bake.version import __version__

_NEEDED = (
    *(
        "version",
        "base",
        "site",
        "route",
        "slot",
        "law",
        "multiplier",
        "band",
        "hidden_size",
        "layers",
    ),
    *("calibration", "direction", "plan", "equivalence", "files"),
)

_NEEDED_OF_ABLATION = (
    *("version", "base", "hidden_size", "layer_count", "ablation", "removed"),
    *("plan", "equivalence", "files"),
)


def describe_bake(base: Base, plan: Plan, decision: Decision) -> dict[str, Any]:
    """Return the part of `bake.json` that says what was done; plain values, no times, no paths."""
    push, direction = decision.push, decision.direction
    choice, evidence = decision.choice, decision.evidence
    route = plan.route
    left_out = describe_left_out(base, plan)
    added = {"added_layers": plan.added_layers} if plan.added_layers else {}
    return {
        "version": 1,
        "bake_version": __version__,
        "base": base.named(),
        "about": decision.about.to_dict(),
        "licence": base.licence,
        "architecture": base.anatomy.architecture,
        "auto_class": auto_class(base.anatomy.config).__name__,
        "layer_count": base.anatomy.layer_count,
        **added,
        "site": route.site,
        "route": route.route,
        "slot": route.to_dict(),
        **push.to_dict(),
        **({"multiplier_choice": choice.to_dict()} if choice else {}),
        **({"sweep": evidence.summarise(push.multiplier)} if evidence else {}),
        "calibration": decision.norms.to_dict(),
        "direction": direction.to_dict(),
        **({"directions": [part.to_dict() for part in direction.parts]} if direction.parts else {}),
        "plan": plan.to_dict(),
        **({"left_out": [entry.to_dict() for entry in left_out]} if left_out else {}),
        "survives": to_values(
            survivals(plan.outline(base.anatomy.model_type, base.anatomy.rotation))
        ),
    }


def describe_left_out(base: Base, plan: Changes) -> tuple[LeftOut, ...]:
    """Return what of the base its bake has not, and why."""
    checkpoint = base.checkpoint
    thin = checkpoint.headers_only
    carried = () if thin or not plan.carries_drafts else checkpoint.drafts
    keys = [f"{key} in config.json" for key, _ in find_code_keys(checkpoint.config)]
    keys += [
        f"{key} in {name}"
        for name, found in find_companion_code(checkpoint).items()
        for key in found
    ]
    return find_left_out(
        [name for name in checkpoint.beside if name not in carried],
        code_keys=keys,
        dropped=[edit.name for edit in plan.edits if isinstance(edit, Drop)],
        drafts=[name for name in checkpoint.beside if is_draft(name)],
        thin=thin and plan.carries_drafts,
    )


def encode_result(result: Mapping[str, Any]) -> str:
    """Return `bake.json`'s text: the same result always gives the same bytes."""
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def read_result(directory: Path) -> dict[str, Any]:
    """Read the `bake.json` of a push.

    Raises CheckpointError where there is none or it is not ours, UnsupportedError for an ablation's.
    """
    result = read_any_result(directory)
    if is_ablation(result):
        raise UnsupportedError(
            f"{directory} is an ablation, and this is for pushes: what was taken out is not in it any "
            f"more, and only its base has it ({result['base']['id']})"
        )
    return result


def read_any_result(directory: Path) -> dict[str, Any]:
    """Read the `bake.json` of a push or of an ablation; raise CheckpointError as `read_result`."""
    result = _read(directory)
    needed = _NEEDED_OF_ABLATION if is_ablation(result) else _NEEDED
    check_record(result, directory / RESULT_FILE, needed=needed)
    return result


def read_part(directory: Path, key: str) -> dict[str, Any]:
    """Read one object of `bake.json`, whatever the others are; raise CheckpointError as `read_result`."""
    result = _read(directory)
    part = {name: result[name] for name in ("version", key) if name in result}
    check_record(part, directory / RESULT_FILE, needed=("version", key))
    return dict(part[key])


def _read(directory: Path) -> dict[str, Any]:
    path = directory / RESULT_FILE
    if not directory.is_dir():
        raise CheckpointError(f"no directory {directory}; give one that bake export wrote")
    if not os.path.lexists(path):
        raise CheckpointError(f"{directory} has no bake.json, so bake did not make it")
    check_links(directory, (RESULT_FILE, DIRECTION_FILE))
    result: dict[str, Any] = read_json(path)
    return result


def base_name(recorded: Mapping[str, Any], directory: Path) -> str:
    """Return the base's Hub id; raise CheckpointError where the base was a local directory."""
    base = recorded["base"]
    if base.get("revision") or base["id"] == DEMO_NAME:
        return str(base["id"])
    raise CheckpointError(
        f"the base of {directory} was a local directory ({base['id']}); name it with --base"
    )


def base_revision(recorded: Mapping[str, Any], given: str | None) -> str | None:
    """Return the recorded revision of the base, unless the user named another base."""
    return None if given else recorded["base"].get("revision")


def rebuild_push(recorded: Mapping[str, Any], directory: Path) -> Push:
    """Return the push: recorded coefficients × the unit vectors in `direction.safetensors`."""
    direction = load_direction(directory / DIRECTION_FILE)
    try:
        layers = tuple(LayerPush(**entry) for entry in recorded["layers"])
        start, stop = recorded["band"]
        given = recorded.get("given_coefficients")
        return Push(
            law=recorded["law"],
            multiplier=float(recorded["multiplier"]),
            band=(int(start), int(stop)),
            hidden_size=int(recorded["hidden_size"]),
            layers=layers,
            directions=direction.select(
                [entry.layer for entry in layers], int(recorded["hidden_size"])
            ),
            given={int(layer): float(value) for layer, value in given.items()} if given else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"bake.json in {directory} is damaged: {error!r}") from None


def rebuild_plan(recorded: Mapping[str, Any], opened: Base, push: Push, directory: Path) -> Plan:
    """Return the plan of a bake: its site, slots and dtype, on its base, with a push.

    directory: where the directions are that it took out first.
    """
    dtype = stored_dtype(recorded)
    route = opened.anatomy.choose(
        recorded["site"],
        kind=recorded["slot"]["kind"],
        route=recorded["slot"]["route"],
        host=recorded["slot"].get("rewritten_as"),
    )
    ablation = rebuild_taken_out(recorded, opened, directory, dtype)
    return make_plan(opened.checkpoint, opened.anatomy, route, push, dtype=dtype, ablation=ablation)


def stored_dtype(recorded: Mapping[str, Any]) -> str | None:
    """Return the dtype that the whole was stored in, None for the base's; raise for an unknown one."""
    known = ("as the base", *FLOAT_DTYPES)
    stored_as = str(recorded["plan"]["dtype"])
    if stored_as not in known:
        raise CheckpointError(
            f"bake.json stores the weights as {stored_as!r}, which is none of "
            f"{', '.join(known)}: do not trust it"
        )
    return None if stored_as == "as the base" else stored_as


SURE_MARGIN, FEW_FORKS = 0.5, 5  # nats; how many are kept whatever their margin


def read_canary(directory: Path) -> dict[str, str]:
    """Return {"prompt", "baked", "base"}; raise EndpointError where the bake has no canary.

    No more of `bake.json` is read or has to be there. Raises CheckpointError where it has another shape.
    """
    canary = read_part(directory, "equivalence").get("canary")
    if not canary:
        raise EndpointError(
            f"{directory} has no canary: base and bake continue every equivalence prompt alike, or it "
            f"is thin and not yet verified"
        )
    return {key: str(canary[key]) for key in ("prompt", "baked", "base")}


def read_forks(directory: Path) -> list[dict[str, Any]]:
    """Return the bake's forks, see `bake.proof.canary.Fork`; none of bakes older than these.

    Those whose margin quantisation moves as well are left out, as long as enough are left.
    """
    forks = read_part(directory, "equivalence").get("forks") or []
    forks = sorted(forks, key=lambda fork: -fork["margin"])
    sure = [fork for fork in forks if fork["margin"] >= SURE_MARGIN]
    kept = sure if len(sure) >= FEW_FORKS else forks[:FEW_FORKS]
    return [dict(fork) for fork in kept]
