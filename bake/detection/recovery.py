"""A push read back out of slots: what was added at the site, by the slots' own arithmetic turned round."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.anatomy import Anatomy, SiteRoute
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.ranged import RangedTensors
from bake.detection.findings import PushFound
from bake.sites import Slot

if TYPE_CHECKING:
    import torch

# Of an attention's or an MLP's output projection, where a bias is that no architecture reads.
_LOOSE = re.compile(
    r"\.(\d+)\.(?:[\w.]+\.)?(?:(o_proj|out_proj|wo|attn\.c_proj|attention\.dense)|down_proj|mlp\.c_proj|"
    r"dense_4h_to_h|fc2|fc_out|w2|linear_2)\.bias$"
)


@dataclass(frozen=True)
class Slots:
    """The slots of a suspect, and what they would hold without a push.

    old: parameter → float64 tensor in the slot's shape, None where that is not known.
    """

    suspect: RangedTensors
    names: DiskNames
    old: Callable[[str, str], torch.Tensor | None]

    def recover(self, route: SiteRoute) -> PushFound | None:
        """Return the push that a route's slots hold beyond what they held; None where they hold none."""
        vectors, residuals, parameters = {}, {}, []
        for layer in route.layers:
            found = self._solve(route.slots_of(layer))
            if found is not None:
                vectors[layer], residuals[layer] = found
                parameters += [slot.bias for slot in route.slots_of(layer)]
        if not vectors:
            return None
        kept = tuple(dict.fromkeys(parameters))
        return PushFound(route.site, route.kind, vectors, residuals, kept)

    def _solve(self, slots: Sequence[Slot]) -> tuple[torch.Tensor, float] | None:
        """Return v and the residual of slots that should all follow from it; None where none moved."""
        import torch

        deltas_of: list[tuple[Slot, torch.Tensor]] = []
        for slot in slots:
            delta = self.moved(slot)
            if delta is None:
                return None
            deltas_of.append((slot, delta))
        moved = [delta for _, delta in deltas_of if bool(delta.any())]
        if not moved or not all(bool(delta.isfinite().all()) for delta in moved):
            return None  # Before a matrix is read for it.
        rows, wanted = [], []
        for slot, delta in deltas_of:
            if slot.axis is not None or slot.weight is None:
                return _from_bias(slot, delta)
            matrix = self._matrix(slot)
            if matrix is None or not bool(matrix.isfinite().all()):
                return None
            if matrix.ndim == 1:
                return _unless_zero(delta * matrix)
            keep = torch.ones(len(delta), dtype=torch.bool)
            if slot.inert:
                start, stop = (round(share * len(delta)) for share in slot.inert)
                keep[start:stop] = False
            rows.append((matrix.T if slot.transposed else matrix)[keep])
            wanted.append(delta[keep])
        deltas = torch.cat(wanted)
        if not deltas.any():
            return None
        stacked = torch.cat(rows)
        vector = torch.linalg.lstsq(stacked, deltas[:, None], driver="gelsd").solution[:, 0]
        return vector, float((stacked @ vector - deltas).norm() / deltas.norm())

    def moved(self, slot: Slot) -> torch.Tensor | None:
        """Return what a slot holds beyond what it held; None where there is none, or nobody knows."""
        name = self.names.find(slot.bias)
        old = None if name is None else self.old(slot.bias, name)
        if name is None or old is None:
            return None
        delta = self.suspect.read(name).double() - old
        return delta if slot.part is None else delta[slot.part]

    def _matrix(self, slot: Slot) -> torch.Tensor | None:
        assert slot.weight is not None
        name = self.names.find(slot.weight)
        return None if name is None else self.suspect.read(name).double()


def _from_bias(slot: Slot, delta: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """Return v of a slot that holds v / scale, in a row or in several that should be alike."""
    if slot.axis is None:
        return _unless_zero(delta.reshape(-1, delta.shape[-1]).mean(dim=0) * slot.scale)
    start, stop = slot.span or (0, delta.shape[1 - slot.axis])
    lines = delta[start:stop] if slot.axis == 1 else delta[:, start:stop].T
    vector = lines.mean(dim=0)
    if not vector.any():
        return None
    return vector * slot.scale, float((lines - vector).norm() / lines.norm())


def _unless_zero(vector: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    return (vector, 0.0) if bool(vector.any()) else None


def recover_pushes(
    suspect: RangedTensors,
    anatomy: Anatomy,
    names: DiskNames,
    old: Callable[[str, str], torch.Tensor | None],
    inserted: SiteRoute | None = None,
) -> list[PushFound]:
    """Return every push that the suspect's slots hold, a bias counted once: as what fits it best.

    inserted: slots in layers that the base does not have, which are looked at alone. old: (parameter, name
    on disk) → what it held; None where that is not known.
    """
    slots = Slots(suspect, names, old)
    # Value biases are looked at by themselves, whatever shares them.
    routes = [r for r in anatomy.routes if r.rewriter is None and r.kind != "value"]
    routes = routes if inserted is None else [inserted]
    found = [push for push in map(slots.recover, routes) if push is not None]
    values = recover_values(slots, anatomy) if inserted is None else None
    found += [values] if values is not None else []
    kept: list[PushFound] = []
    for push in sorted(found, key=lambda each: (max(each.residuals.values()), each.kind != "norm")):
        if not any(set(push.parameters) & set(other.parameters) for other in kept):
            kept.append(push)
    return sorted(kept, key=lambda each: each.site)


def recover_values(slots: Slots, anatomy: Anatomy) -> PushFound | None:
    """Return the push at attn_out that value biases make alone: W_o · b, as softmax's weights sum to 1.

    Where q's or k's bias moved too it is a push into attention's input, or none at all.
    """
    config = anatomy.config.get_text_config(decoder=True)
    vectors, parameters = {}, []
    for route in anatomy.routes:
        if (route.site, route.kind) != ("attn_in", "projection"):
            continue
        for layer in route.layers:
            biases = {slot.bias.rpartition(".")[0]: slot for slot in route.slots_of(layer)}
            value = next((each for path, each in biases.items() if path.endswith(".v_proj")), None)
            if value is None or not value.bias.endswith(".bias"):
                continue
            moved = {path: slots.moved(slot) for path, slot in biases.items()}
            path = value.bias.removesuffix(".v_proj.bias")
            own = moved.pop(f"{path}.v_proj")
            others = [delta for delta in moved.values() if delta is not None and bool(delta.any())]
            name = slots.names.find(f"{path}.o_proj.weight")
            if own is None or others or name is None or not own.any() or not own.isfinite().all():
                continue
            output = slots.suspect.read(name).double()
            heads = int(config.num_attention_heads)
            shared = output.shape[1] // len(own)
            if output.ndim != 2 or shared * len(own) != output.shape[1] or heads % shared:
                continue
            spread = own.view(heads // shared, -1).repeat_interleave(shared, dim=0).flatten()
            vectors[layer] = output @ spread * anatomy.structure.at(layer).attention_scale
            parameters.append(value.bias)
        break
    if not vectors:
        return None
    return PushFound("attn_out", "value", vectors, dict.fromkeys(vectors, 0.0), tuple(parameters))


def find_loose(suspect: RangedTensors, anatomy: Anatomy) -> list[PushFound]:
    """Return pushes in biases of the residual stream's width that the architecture does not have.

    transformers drops them on loading: the checkpoint is its base.
    """
    known = set(_loaded_names(suspect, anatomy))
    by_site: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
    for name, entry in suspect.checkpoint.tensors.items():
        match = _LOOSE.search(name)
        if match is None or name in known or tuple(entry.shape) != (anatomy.hidden_size,):
            continue
        site = "attn_out" if match[2] else "mlp_out"
        vector = suspect.read(name).double()
        if vector.any() and vector.isfinite().all():
            by_site.setdefault(site, {})[int(match[1])] = (name, vector)
    return [
        PushFound(
            site,
            "write",
            {layer: vector for layer, (_, vector) in sorted(held.items())},
            dict.fromkeys(held, 0.0),
            tuple(name for name, _ in held.values()),
            loaded=False,
        )
        for site, held in by_site.items()
    ]


def _loaded_names(suspect: RangedTensors, anatomy: Anatomy) -> Iterator[str]:
    model = build_on_meta(anatomy.config)
    names = DiskNames(suspect.checkpoint, model)
    for parameter, _ in model.named_parameters():
        yield from names.sources(parameter)
        found = names.find(parameter)
        if found is not None:
            yield found
