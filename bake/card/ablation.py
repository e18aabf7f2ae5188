"""What the model card of an ablation says beside the values of its `bake.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ABLATION_TEMPLATE = "ablation.md.jinja"


def is_ablation(recorded: Mapping[str, Any]) -> bool:
    """Tell whether a `bake.json` is of an ablation, and not of a push that follows one."""
    return "ablation" in recorded and "site" not in recorded


def ablation_words(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the phrases that the card of an ablation needs beside its `bake.json`."""
    about, rank = recorded.get("about") or {}, recorded["ablation"]["rank"]
    base = str(recorded["base"]["id"]).rpartition("/")[2]
    what = "one direction" if rank == 1 else f"{rank} directions"
    told = recorded["ablation"]
    silent = [
        f"{kind[:-1] if len(told[kind]) == 1 else kind} {', '.join(told[kind])}"
        for kind in ("heads", "neurons")
        if told.get(kind)
    ]
    what = " and ".join(silent) or what
    if about.get("concept"):
        what = f"the direction {about['concept']}"
    return {
        "title": about.get("name") or f"{base} without {what}",
        "description": about.get("description"),
        "what": what,
        "edited": _kinds(recorded["plan"]["patched"]),
        "config_changes": recorded["plan"]["config_changes"],
    }


def _kinds(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the edited tensors by kind: the names with numbers left out, and how many of each."""
    counts: dict[str, int] = {}
    for name in names:
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        counts[kind] = counts.get(kind, 0) + 1
    return [{"name": kind, "count": count} for kind, count in counts.items()]
