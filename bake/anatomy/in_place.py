"""Slots in the architecture as it is: there already (`native`) or created by flags of its config (`flag`).

Every kind of layer is searched for itself, since a hybrid's layers differ; what is found is proven
together, on all layers of the twin that it covers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.anatomy.flags import FlagEffect, find_idle_flags
from bake.anatomy.layers import LayerKind, LayerMap
from bake.anatomy.slots import Proposal, SlotKind, explain_no_slot, propose_slots
from bake.anatomy.twin import TWIN_ERRORS, Twin, TwinVerdict, one_line
from bake.errors import UnsupportedError
from bake.sites import DESCRIPTIONS, LayerStructure, Slot, capture_location

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class InPlace:
    """Slots for a site that the twin has proven. slots: {decoder layer of the real model: its slots}."""

    kind: SlotKind
    flags: Mapping[str, Any]
    slots: Mapping[int, tuple[Slot, ...]]
    verdict: TwinVerdict


@dataclass(frozen=True)
class InPlaceSearch:
    """What the search needs to know; `no_attention` has each kind's reason to have no `attn_out`."""

    twin: Twin
    effects: Sequence[FlagEffect]
    layers: LayerMap
    structures: Mapping[LayerKind, LayerStructure]
    twin_structure: LayerStructure
    no_attention: Mapping[LayerKind, str | None]

    def find(self, site: str) -> tuple[list[InPlace], list[str]]:
        """Return what is exact at a site, and the reasons against what is not."""
        reasons: list[str] = []
        if not self.layers.kinds:
            return [], [
                "no layer of a small twin is like the model's, so nothing can be proven on one"
            ]
        proposals = {kind: self._propose(site, kind, reasons) for kind in self.layers.kinds}
        found = []
        for slot_kind in dict.fromkeys(p.kind for given in proposals.values() for p in given):
            options = {
                kind: [proposal for proposal in given if proposal.kind == slot_kind]
                for kind, given in proposals.items()
                if any(proposal.kind == slot_kind for proposal in given)
            }
            proven = self._choose(site, options, reasons)
            if proven is not None:
                found.append(proven)
        # Kinds of layers fail alike: measured errors aside, each reason is said once.
        distinct = {re.sub(r"\d", "", reason): reason for reason in reversed(reasons)}
        return found, list(reversed(distinct.values()))

    @cached_property
    def flagged(self) -> nn.Module:
        """The twin with every usable flag set at once."""
        return self.twin.with_flags({effect.path: effect.value for effect in self.effects})

    def _propose(self, site: str, kind: LayerKind, reasons: list[str]) -> list[Proposal]:
        """Return what may be exact in layers of a kind; add to `reasons` what cannot."""
        structure = self.structures[kind]
        try:
            capture_location(site, structure)
        except UnsupportedError:
            reasons.append(self._why_no_site(site, kind))
            return []
        layer = self.layers.probed_layer(kind)
        try:
            proposals = propose_slots(self.twin, self.flagged, structure, site, layer)
            if not proposals:
                reasons.append(self._why_no_slot(site, structure, layer))
        except TWIN_ERRORS as error:
            reasons.append(f"the twin cannot be probed there ({one_line(error)})")
            return []
        for proposal in proposals:
            if proposal.missing:
                reasons.append(f"no flag of the config creates {', '.join(proposal.missing)}")
        return [proposal for proposal in proposals if not proposal.missing]

    def _choose(
        self, site: str, options: Mapping[LayerKind, list[Proposal]], reasons: list[str]
    ) -> InPlace | None:
        """Return the first proposals that the twin proves, for as many kinds of layers as it does."""
        first = {kind: given[0] for kind, given in options.items()}
        proven = self._prove(site, first, reasons)
        if proven is not None:
            return proven
        if len(options) == 1 and len(first) == sum(map(len, options.values())):
            return None
        chosen: dict[LayerKind, Proposal] = {}
        alone = None
        for kind, given in options.items():
            # The only kind's first proposal has just failed.
            for proposal in given[1:] if len(options) == 1 else given:
                proven = self._prove(site, {kind: proposal}, reasons)
                if proven is not None:
                    chosen[kind], alone = proposal, proven
                    break
        return self._prove(site, chosen, reasons) if len(chosen) > 1 else alone

    def _prove(
        self, site: str, chosen: Mapping[LayerKind, Proposal], reasons: list[str]
    ) -> InPlace | None:
        flags = self._flags_for(chosen)
        everything = {effect.path: effect.value for effect in self.effects}
        proven = self._prove_with(flags, site, chosen, reasons)
        if proven is None and flags and flags != everything:
            # Some configurations are valid only with several flags at once.
            proven = self._prove_with(everything, site, chosen, [])
        return proven

    def _prove_with(
        self,
        flags: Mapping[str, Any],
        site: str,
        chosen: Mapping[LayerKind, Proposal],
        reasons: list[str],
    ) -> InPlace | None:
        try:
            verdict = self.twin.prove(
                self.twin_structure,
                site,
                flags,
                {
                    layer: proposal.slots_of(layer)
                    for kind, proposal in chosen.items()
                    for layer in self.layers.twin_layers(kind)
                },
            )
        except TWIN_ERRORS as error:
            reasons.append(f"the twin cannot be baked ({one_line(error)})")
            return None
        if not verdict.passed:
            reasons.append(self._explain(verdict))
            return None
        slots = {
            layer: proposal.slots_of(layer)
            for kind, proposal in chosen.items()
            for layer in self.layers.real_layers(kind)
        }
        kind = next(iter(chosen.values())).kind
        return InPlace(kind, flags, dict(sorted(slots.items())), verdict)

    def _explain(self, verdict: TwinVerdict) -> str:
        if not self.twin.round_trips:
            return "transformers does not save and reload this architecture unchanged, even unbaked"
        return str(verdict.reason)

    def _flags_for(self, chosen: Mapping[LayerKind, Proposal]) -> dict[str, Any]:
        """Return the flags that create the slots; all usable ones if no single flag does."""
        present = {name for name, _ in self.twin.model.named_parameters()}
        wanted = {
            slot.bias
            for kind, proposal in chosen.items()
            for layer in self.layers.twin_layers(kind)
            for slot in proposal.slots_of(layer)
        } - present
        needed: dict[str, FlagEffect] = {}
        for name in sorted(wanted):
            creating = [effect for effect in self.effects if name in effect.adds]
            if not creating:
                return {effect.path: effect.value for effect in self.effects}
            needed[creating[0].path] = creating[0]
        return {path: effect.value for path, effect in needed.items()}

    def _why_no_site(self, site: str, kind: LayerKind) -> str:
        if site == "attn_out":
            return str(self.no_attention[kind])
        return f"the decoder layer has no module whose activation is {DESCRIPTIONS[site]}"

    def _why_no_slot(self, site: str, structure: LayerStructure, layer: int) -> str:
        close = explain_no_slot(self.twin, self.flagged, structure, site, layer)
        if close is not None:
            return close
        block = structure.attention if site == "attn_out" else structure.mlp
        tried = ", ".join(effect.path for effect in self.effects) or "none that creates one"
        idle_flags = find_idle_flags(self.twin.config)
        idle = f"; set, {' and '.join(idle_flags)} creates nothing" if idle_flags else ""
        return (
            f"{block or 'the layer'} has no bias that moves only this activation "
            f"(bias flags of the config: {tried}{idle})"
        )
