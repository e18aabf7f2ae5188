"""The examination of an architecture: its layers, and every route that its twin proves.

The parts do the work (`structure`, `layers`, `in_place`, `hosts`, `insertion`); here they are put to
the real model, on the meta device, and to the twin. Which route is taken is decided in `choice`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from bake.anatomy.choice import Anatomy
from bake.anatomy.flags import added_parameters, find_bias_flags, parameter_shapes
from bake.anatomy.hosts import HostRewriter, find_hosts
from bake.anatomy.in_place import InPlace, InPlaceSearch
from bake.anatomy.insertion import find_insertion
from bake.anatomy.layers import LayerKind, LayerMap, choose_layers_to_keep, find_layer_kinds
from bake.anatomy.residual import trace_residual
from bake.anatomy.routes import SiteRoute
from bake.anatomy.scales import scale_of_real
from bake.anatomy.structure import combine, find_decoder_layers, find_structure
from bake.anatomy.twin import TWIN_ERRORS, Twin, one_line, small_config
from bake.anatomy.writes import Ablatable, WriteSearch
from bake.checkpoint.loading import build_on_meta, quiet_transformers, single_thread
from bake.engines.survival import Outline
from bake.errors import BakeError, UnsupportedError
from bake.sites import SITES, LayerStructure, Slot
from bake.writes import SCOPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def examine(config: PreTrainedConfig, *, briefly: bool = False) -> Anatomy:
    """Find every exact route of a configuration's architecture, each proven on its twin.

    briefly: stop at `mlp_out` where that has a slot in place, which is what `auto` takes then.

    Takes a second; touches no weight of the model and none of torch's random state. An equal
    configuration is examined once in a process. Raises UnsupportedError where transformers has no causal
    language model for the configuration, where it has no list of decoder layers, or where no small twin
    of it can be made.
    """
    if briefly and (type(config), _content(config)) not in _anatomies:
        found = _once(_brief_anatomies, config, partial(_examine, briefly=True))
    else:
        found = _once(_anatomies, config, _examine)
    return replace(found, config=config)


def prove_insertion(config: PreTrainedConfig) -> SiteRoute:
    """Return the route `insert` of a configuration's architecture, proven on its twin.

    An equal configuration is examined once in a process. Raises UnsupportedError with the reason where no
    layer can be inserted.
    """
    return _once(_insertions, config, _prove_insertion)


def prove_ablation(config: PreTrainedConfig) -> Ablatable:
    """Return what can be taken out of a configuration's architecture exactly, proven on its twin.

    An equal configuration is examined once in a process. Where nothing can, the result says why.
    """
    return _once(_ablations, config, _prove_ablation)


Key = tuple[type, str]
Found = TypeVar("Found")
MOST_KEPT = 32  # configurations
_anatomies: dict[Key, Anatomy] = {}
_brief_anatomies: dict[Key, Anatomy] = {}
_insertions: dict[Key, SiteRoute] = {}
_ablations: dict[Key, Ablatable] = {}


def forget_examinations() -> None:
    """Examine anew whatever comes next, for tests that change the code that examines."""
    _anatomies.clear()
    _brief_anatomies.clear()
    _insertions.clear()
    _ablations.clear()


def _once(
    kept: dict[Key, Found], config: PreTrainedConfig, examine: Callable[[PreTrainedConfig], Found]
) -> Found:
    """Return what was found for an equal configuration before, or now; the last few are kept."""
    key = (type(config), _content(config))
    if key not in kept:
        found = examine(config)
        while len(kept) >= MOST_KEPT:
            del kept[next(iter(kept))]
        kept[key] = found
    return kept[key]


def _content(config: PreTrainedConfig) -> str:
    """Return all that a configuration says, but for where it was read."""

    def without_place(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: without_place(value) if isinstance(value, Mapping) else value
            for key, value in values.items()
            if key != "_name_or_path"
        }

    told = {**config.to_dict(), "attention": config._attn_implementation_internal}
    return json.dumps(without_place(told), sort_keys=True, default=repr)


def _examine(config: PreTrainedConfig, *, briefly: bool = False) -> Anatomy:
    import torch

    with single_thread(), quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            return _Examination(config).anatomy(briefly=briefly)
        except TWIN_ERRORS as error:
            raise UnsupportedError(
                f"{config.model_type}: no small twin of this architecture can be made and run, so "
                f"nothing can be proven on it ({one_line(error)})"
            ) from error


def _prove_insertion(config: PreTrainedConfig) -> SiteRoute:
    import torch

    with single_thread(), quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            return _Examination(config).insertion()
        except TWIN_ERRORS as error:
            raise UnsupportedError(
                f"{config.model_type}: no layer can be inserted, the twin cannot be baked "
                f"({one_line(error)})"
            ) from error


def _prove_ablation(config: PreTrainedConfig) -> Ablatable:
    import torch

    with single_thread(), quiet_transformers(), torch.random.fork_rng(devices=[]):
        try:
            return _Examination(config).ablation()
        except TWIN_ERRORS as error:
            reason = f"no small twin of this architecture can be made ({one_line(error)})"
            return Ablatable(None, {}, dict.fromkeys(SCOPES, reason))


class _Examination:
    """The working state of `examine`: the real model on the meta device, and its twin."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        try:
            self.real = build_on_meta(config)
        except ValueError as error:
            if type(config) in _causal_configs():
                raise
            raise UnsupportedError(
                f"transformers has no causal language model for model type {config.model_type!r}"
            ) from error
        self.layers, self.layer_count = find_decoder_layers(self.real)
        self.layer_map, self.keep = self._match_layers()
        self.twin = Twin(config, keep=self.keep)
        self.structures: dict[LayerKind, LayerStructure] = {}
        self.no_attention: dict[LayerKind, str | None] = {}
        for kind in self.layer_map.kinds:
            self.structures[kind], self.no_attention[kind] = self._trace(kind)
        self.structure = combine(
            {
                index: self._real_structure(index, kind)
                for index, kind in enumerate(self.layer_map.real)
            }
        )
        self.twin_structure = combine(
            {
                index: self.structures.get(kind, LayerStructure(self.layers, None, None, None))
                for index, kind in enumerate(self.layer_map.twin)
            }
        )
        self.in_place = InPlaceSearch(
            self.twin,
            find_bias_flags(self.twin.config),
            self.layer_map,
            self.structures,
            self.twin_structure,
            self.no_attention,
        )

    def anatomy(self, *, briefly: bool = False) -> Anatomy:
        routes: list[SiteRoute] = []
        refusals: dict[str, str] = {}
        for site in SITES:
            found, reasons = self._routes(site)
            if site == "mlp_out" and not found:
                hosted, why = self._hosts(site)
                found, reasons = found + hosted, reasons + why
            routes += found
            if not found:
                refusals[site] = "; ".join(dict.fromkeys(reasons))
            if briefly and site == "mlp_out" and any(route.rewriter is None for route in found):
                break
        return Anatomy(
            architecture=type(self.real).__name__,
            model_type=self.config.model_type,
            layer_count=self.layer_count,
            hidden_size=int(self.config.get_text_config().hidden_size),
            structure=self.structure,
            prefix=f"{getattr(self.real, 'base_model_prefix', '')}.",
            routes=tuple(routes),
            refusals=refusals,
            config=self.config,
            prove_insertion=partial(prove_insertion, self.config),
            prove_ablation=partial(prove_ablation, self.config),
        )

    def ablation(self) -> Ablatable:
        """Find what writes to the residual stream, and prove that it can be ablated."""
        return WriteSearch(
            self.config, self.real, self.twin, self.layer_map, self.structures, self.layers
        ).find()

    def insertion(self) -> SiteRoute:
        """Find and prove what an extra layer can hold; see `prove_insertion`."""
        rewriter, verdict = find_insertion(
            self.config,
            self.twin,
            lambda: Twin(self.config, keep=self.keep),
            self.twin_structure,
            self.in_place.effects,
        )
        return SiteRoute(
            site="mlp_out",
            route="insert",
            kind="write",
            flags=dict(rewriter.filling.flags),
            slots={},
            new_parameters={},
            twin=verdict,
            layers=tuple(range(self.layer_count)),
            rewriter=rewriter,
        )

    def _match_layers(self) -> tuple[LayerMap, Sequence[int]]:
        """Choose which real layers the twin is made of, so that it has every kind of layer."""
        real = find_layer_kinds(self.real, self.layers, self.config)
        best: tuple[LayerMap, Sequence[int]] | None = None
        failure: Exception | None = None
        for keep in choose_layers_to_keep(real):
            try:
                small = small_config(self.config, keep)
                twin = find_layer_kinds(build_on_meta(small), self.layers, small)
            except TWIN_ERRORS as error:
                failure = failure or error
                continue
            found = LayerMap(real, twin)
            if best is None or len(found.strangers) < len(best[0].strangers):
                best = found, keep
            if not found.strangers:
                break
        if best is None:
            raise failure or UnsupportedError(
                f"{self.config.model_type}: its {self.layer_count} layers are of "
                f"{len(set(real))} kinds, too many for a small twin to hold them all"
            )
        return best

    def _trace(self, kind: LayerKind) -> tuple[LayerStructure, str | None]:
        """Return what the parts of a kind of layer are called, and why it has no `attn_out`."""
        layer = self.layer_map.probed_layer(kind)
        proposed = find_structure(self.twin.model, self.layers, layer)
        try:
            return trace_residual(self.twin, proposed, layer)
        except (*TWIN_ERRORS, UnsupportedError) as error:
            reason = f"the twin's layer cannot be traced ({one_line(error)})"
            return LayerStructure(self.layers, None, None, None), reason

    def _real_structure(self, layer: int, kind: LayerKind) -> LayerStructure:
        """Return the structure of a layer of the real model; an empty one for a kind without a twin."""
        found = self.structures.get(kind)
        if found is None:
            return LayerStructure(self.layers, None, None, None)
        scale = self._real_scale(found.attention_scale, layer)
        return replace(found, attention_scale=scale)

    def _real_scale(self, measured: float, layer: int) -> float:
        """Return a factor that was measured on the twin as a layer of the real model has it."""
        probed = self.layer_map.probed_layer(self.layer_map.real[layer])
        return scale_of_real(
            measured,
            self.twin.model.get_submodule(f"{self.layers}.{probed}"),
            self.real.get_submodule(f"{self.layers}.{layer}"),
        )

    def _routes(self, site: str) -> tuple[list[SiteRoute], list[str]]:
        found, reasons = self.in_place.find(site)
        routes = []
        for proven in found:
            route, lacking = self._on_the_real_model(site, proven)
            if lacking is not None:
                reasons.append(f"not every decoder layer has it ({lacking} does not exist)")
            if route is not None:
                routes.append(route)
        return routes, reasons

    def _on_the_real_model(self, site: str, proven: InPlace) -> tuple[SiteRoute | None, str | None]:
        """Return the route on the layers that really have the slots, and a slot that some lack."""
        created = self._created_by(proven.flags)
        present = self._shapes.keys() | created.keys()
        slots: dict[int, tuple[Slot, ...]] = {}
        lacking = None
        for layer, wanted in proven.slots.items():
            names = [name for slot in wanted for name in (slot.bias, slot.weight) if name]
            absent = [name for name in names if name not in present]
            if absent:
                lacking = lacking or absent[0]
            elif any(slot.solved and not self._is_reached(slot, created) for slot in wanted):
                lacking = lacking or f"a value for every head in {wanted[0].bias}"
            else:
                slots[layer] = tuple(
                    replace(slot, scale=self._real_scale(slot.scale, layer)) for slot in wanted
                )
        if not slots:
            return None, lacking
        return (
            SiteRoute(
                site=site,
                route="flag" if proven.flags else "native",
                kind=proven.kind,
                flags=proven.flags,
                slots=slots,
                new_parameters=created,
                twin=proven.verdict,
                layers=tuple(slots),
            ),
            lacking,
        )

    def _is_reached(self, slot: Slot, created: Mapping[str, tuple[int, ...]]) -> bool:
        """Tell whether a solved slot has a value for each that its matrix reads, and enough."""
        rows, columns = self._shapes[str(slot.weight)]
        shape = created.get(slot.bias) or self._shapes[slot.bias]
        return shape == (columns,) and rows <= columns

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return parameter_shapes(self.real)

    def _hosts(self, site: str) -> tuple[list[SiteRoute], list[str]]:
        """Try every host of the table that can express the configuration."""
        routes = []
        hosts, reasons = find_hosts(self.config, self.layers)
        for host in hosts:
            try:
                route = self._prove_host(site, host)
            except (BakeError, *TWIN_ERRORS) as error:
                reasons.append(f"as {host.name}: the twin cannot be baked ({one_line(error)})")
                continue
            if route.twin.passed:
                routes.append(route)
            else:
                reasons.append(f"as {host.name}: {route.twin.reason}")
        return routes, reasons

    def _prove_host(self, site: str, host: HostRewriter) -> SiteRoute:
        layers = range(len(self.twin.model.get_submodule(self.layers)))  # type: ignore[arg-type]
        slots = {layer: host.slots_of(layer, self.config) for layer in range(self.layer_count)}
        created = host.new_parameters(self.config)
        flags = host.flags(self.config)
        pushed = tuple(slot.bias for parts in slots.values() for slot in parts)
        return SiteRoute(
            site=site,
            route="host",
            kind="write",
            flags=flags,
            slots=slots,
            new_parameters=created,
            twin=self.twin.prove_rewriting(self.twin_structure, site, host, layers),
            layers=tuple(range(self.layer_count)),
            rewriter=host,
            rewritten=Outline(
                host.model_type(self.config), pushed, tuple(created), host.settings(self.config)
            ),
        )

    def _created_by(self, flags: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
        """Return what the flags create on the whole model; a large model is built once for each set."""
        if not flags:
            return {}
        key = tuple(sorted(flags.items()))
        if key not in self._created:
            self._created[key] = added_parameters(self.config, flags)
        return self._created[key]

    @cached_property
    def _created(self) -> dict[tuple[tuple[str, Any], ...], Mapping[str, tuple[int, ...]]]:
        return {}


def _causal_configs() -> set[type[PreTrainedConfig]]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return set(MODEL_FOR_CAUSAL_LM_MAPPING.keys())
