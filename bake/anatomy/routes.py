"""A route: one exact way to put a push at a site, and what it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bake.anatomy.insertion import Insertion
from bake.anatomy.rewriting import Rewriter
from bake.anatomy.slots import SlotKind
from bake.anatomy.twin import TwinVerdict
from bake.engines.survival import Outline
from bake.sites import Slot

RouteName = Literal["native", "flag", "host", "insert"]
ROUTES = ("auto", "native", "flag", "host", "insert")


@dataclass(frozen=True)
class SiteRoute:
    """One exact way to put a push at a site.

    flags: config keys that are set. slots: {decoder layer of the base: its slots}; layers that the
    route cannot push are not in it. new_parameters: {name: shape} of everything that the flags create
    on the whole model; what no push goes to is zero. rewriter: what turns the base into another stock
    model first (routes `host` and `insert`); the slots are then known when the layers are, and come
    with the rewritten checkpoint. rewritten: what an engine will see of that, for `--target`; where a
    route does not say, it is unknown until it is planned.
    """

    site: str
    route: RouteName
    kind: SlotKind
    flags: Mapping[str, Any]
    slots: Mapping[int, tuple[Slot, ...]]
    new_parameters: Mapping[str, tuple[int, ...]]
    twin: TwinVerdict
    layers: tuple[int, ...]
    rewriter: Rewriter | None = None
    rewritten: Outline | None = None

    def slots_of(self, layer: int) -> tuple[Slot, ...]:
        """Return the slots of decoder layer `layer` of the base."""
        return self.slots[layer]

    def outline(self, model_type: str, rotation: Mapping[str, Any] | None = None) -> Outline | None:
        """Return what an engine will see of the output; model_type, rotation: the base's."""
        if self.rewriter is not None:
            return self.rewritten
        pushed = (slot.bias for slots in self.slots.values() for slot in slots)
        return Outline(model_type, tuple(pushed), tuple(self.new_parameters), rotation=rotation)

    @property
    def added_values(self) -> int:
        """How many numbers the route adds to the checkpoint."""
        total = 0
        for shape in self.new_parameters.values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total

    @property
    def caveat(self) -> str | None:
        """Why the real model may show an error that the twin did not; None where it cannot."""
        return self.rewriter.caveat if isinstance(self.rewriter, Insertion) else None

    @property
    def on_request(self) -> bool:
        """Whether `auto` leaves the route out: it has a price, or a limit that its host states."""
        return (
            self.route == "insert"
            or self.kind == "value"
            or bool(getattr(self.rewriter, "limit", ""))
        )

    def describe(self) -> str:
        """Say in a phrase how the route works, for `bake inspect` and announcements."""
        if self.rewriter is not None:
            return self.rewriter.describe()
        templates = self._templates()
        names = dict.fromkeys(slot.bias.partition("{layer}.")[2] for slot in templates)
        if self.kind == "value":
            weights = {str(slot.weight).partition("{layer}.")[2] for slot in templates}
            names = dict.fromkeys(f"{name} through {', '.join(weights)}" for name in names)
        how = "already there" if self.route == "native" else f"created by {' + '.join(self.flags)}"
        return f"{', '.join(names)} ({how})"

    def _templates(self) -> list[Slot]:
        """Return the slots with "{layer}" for the layer's index, each once."""
        found: dict[Slot, None] = {}
        for layer, slots in self.slots.items():
            mark, place = f".{layer}.", ".{layer}."
            for slot in slots:
                weight = slot.weight and slot.weight.replace(mark, place, 1)
                found[replace(slot, bias=slot.bias.replace(mark, place, 1), weight=weight)] = None
        return list(found)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json` and `--json`."""
        return {
            "site": self.site,
            "route": self.route,
            **({"rewritten_as": self.rewriter.name} if self.rewriter is not None else {}),
            "kind": self.kind,
            "description": self.describe(),
            "flags": dict(self.flags),
            "slots": [slot.to_dict() for slot in self._templates()],
            "layers": list(self.layers),
            "added_values": self.added_values,
            "twin": self.twin.to_dict(),
        }
