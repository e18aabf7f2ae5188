"""Which sites of an architecture can take a push exactly, by which route, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from bake.anatomy.flags import added_parameters, find_bias_flags, parameter_shapes
from bake.anatomy.hosts import HostRewriter, find_hosts
from bake.anatomy.in_place import InPlace, InPlaceSearch
from bake.anatomy.insertion import Insertion, find_insertion
from bake.anatomy.layers import LayerKind, LayerMap, choose_layers_to_keep, find_layer_kinds
from bake.anatomy.residual import trace_residual
from bake.anatomy.rewriting import Rewriter
from bake.anatomy.slots import SlotKind
from bake.anatomy.structure import combine, find_decoder_layers, find_structure
from bake.anatomy.twin import TWIN_ERRORS, Twin, TwinVerdict, one_line, small_config
from bake.engines import (
    Outline,
    Survival,
    check_engine,
    describe_survivals,
    known_types,
    survival_of,
    survivals,
    to_values,
)
from bake.errors import BakeError, UnsupportedError
from bake.loading import build_on_meta, single_thread
from bake.sites import SITES, LayerStructure, Slot, check_site, suits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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

    def outline(self, model_type: str) -> Outline | None:
        """Return what an engine will see of the output; model_type: the base's."""
        if self.rewriter is not None:
            return self.rewritten
        pushed = (slot.bias for slots in self.slots.values() for slot in slots)
        return Outline(model_type, tuple(pushed), tuple(self.new_parameters))

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

    def describe(self) -> str:
        """Say in a phrase how the route works, for `bake inspect` and announcements."""
        if self.rewriter is not None:
            return self.rewriter.describe()
        names = dict.fromkeys(slot.bias.partition("{layer}.")[2] for slot in self._templates())
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


@dataclass(frozen=True)
class Anatomy:
    """What bake knows of an architecture: its layers, the exact routes, and the refusals."""

    architecture: str
    model_type: str
    layer_count: int
    hidden_size: int
    structure: LayerStructure
    prefix: str
    routes: tuple[SiteRoute, ...]
    refusals: Mapping[str, str]
    config: PreTrainedConfig = field(repr=False, compare=False)

    def choose(
        self,
        site: str,
        *,
        kind: str | None = None,
        found_at: str | None = None,
        target: str | None = None,
        route: str = "auto",
        host: str | None = None,
    ) -> SiteRoute:
        """Return the route for a site, or for `auto` the first exact site in the order of preference.

        kind: "norm" or "projection" where a site has both. found_at: the site of a given direction;
        `auto` considers only sites that suit it. target: only routes that are known to survive in that
        engine. route: `native`, `flag`, `host` or `insert`; with `auto` the base is not given extra
        layers. host: the name of one rewriter. Raises UnsupportedError with the reason and what works
        instead.
        """
        if target is not None:
            check_engine(target)
        if site != "auto":
            check_site(site)
        if route not in ROUTES:
            raise UnsupportedError(f"unknown route {route!r}; the routes are {', '.join(ROUTES)}")
        if route == "insert":
            if target not in (None, "transformers"):
                raise UnsupportedError(
                    f"whether added layers survive in {target} is not known; leave --target or --route "
                    f"insert out"
                )
            return self._choose_insertion(site, found_at)
        candidates = [
            entry
            for entry in self.routes
            if site in ("auto", entry.site)
            and (kind is None or entry.kind == kind)
            and (site != "auto" or found_at is None or suits(found_at, entry.site))
            and (entry.route != "insert" if route == "auto" else entry.route == route)
            and (host is None or (entry.rewriter is not None and entry.rewriter.name == host))
        ]
        if candidates:
            if target is not None:
                candidates = self._surviving(candidates, target)
            return min(candidates, key=_preference)
        instead = ", ".join(dict.fromkeys(_spell(entry) for entry in self.routes)) or NO_SITE
        wanted = "the direction at any site" if site == "auto" else site
        if route != "auto":
            wanted += f" by route {route}"
        # Where the site was left open, the reason that counts is the first choice's.
        asked = "mlp_out" if site == "auto" else site
        reason = self.refusals.get(asked, f"no {kind or 'such'} slot suits")
        raise UnsupportedError(
            f"{self.model_type} cannot take {wanted} exactly: {reason}; exact here: {instead}"
        )

    def survivals(self, route: SiteRoute) -> tuple[Survival, ...]:
        """Say what every engine does with a bake by one of the routes."""
        return survivals(route.outline(self.model_type))

    def _surviving(self, candidates: list[SiteRoute], target: str) -> list[SiteRoute]:
        """Keep the routes that survive in an engine; raise UnsupportedError where none is known to."""
        judged = [
            (route, survival_of(target, route.outline(self.model_type))) for route in self.routes
        ]
        kept = [route for route, found in judged if found.verdict == "kept"]
        asked = [(route, found) for route, found in judged if route in candidates]
        if any(route in kept for route in candidates):
            return [route for route in candidates if route in kept]
        first, found = asked[0]
        if all(other.verdict == "unknown" for _, other in asked):
            raise UnsupportedError(
                f"whether a bake of {self.model_type} survives in {found.label} is not known "
                f"({found.reason}); checked there: {', '.join(known_types(target))}"
            )
        told = dict.fromkeys(f"{route.site} {found.describe()}" for route, found in asked)
        instead = dict.fromkeys(f"--site {route.site}" for route in kept)
        raise UnsupportedError(
            f"{self.model_type} cannot be baked for {found.label} so: {'; '.join(told)}. What survives "
            f"there: {', '.join(instead) or 'no route that is known'}; "
            f"{first.site} {describe_survivals(self.survivals(first), brief=True)}"
        )

    @cached_property
    def insertion(self) -> SiteRoute:
        """The route `insert`, proven on the twin when it is first asked for.

        Raises UnsupportedError with the reason where no layer can be inserted.
        """
        import torch

        with single_thread(), torch.random.fork_rng(devices=[]):
            try:
                return _Examination(self.config).insertion()
            except TWIN_ERRORS as error:
                raise UnsupportedError(
                    f"{self.model_type}: no layer can be inserted, the twin cannot be baked "
                    f"({one_line(error)})"
                ) from error

    def with_insertion(self) -> Anatomy:
        """Return the anatomy with the route `insert` among its routes, or why there is none."""
        try:
            return replace(self, routes=(*self.routes, self.insertion))
        except UnsupportedError as error:
            return replace(self, refusals={**self.refusals, "insert": str(error)})

    def _choose_insertion(self, site: str, found_at: str | None) -> SiteRoute:
        found = self.insertion
        if site not in ("auto", found.site):
            raise UnsupportedError(
                f"an inserted layer adds to the residual stream at {found.site}, not at {site}; "
                f"leave --site out"
            )
        if site == "auto" and found_at is not None and not suits(found_at, found.site):
            raise UnsupportedError(
                f"the direction was found at {found_at}, and an inserted layer adds at {found.site}; "
                f"find it there (bake direction --site {found.site})"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "architecture": self.architecture,
            "model_type": self.model_type,
            "layer_count": self.layer_count,
            "hidden_size": self.hidden_size,
            "structure": asdict(self.structure),
            "routes": [
                {**route.to_dict(), "survives": to_values(self.survivals(route))}
                for route in self.routes
            ],
            "refusals": dict(self.refusals),
        }


# What to say where nothing is exact.
NO_SITE = "no site; --route insert adds layers instead, where it can"
# The order in which `--site auto` considers them (DESIGN: residual writes first, then the fewest changes).
_PREFERENCE = (
    ("mlp_out", "in place"),
    ("mlp_out", "llama"),  # what engines run best, and lossless
    ("attn_out", "in place"),
    ("mlp_out", "rewritten"),
    ("attn_out", "rewritten"),
    ("attn_in", "in place"),
    ("attn_in", "rewritten"),
    ("mlp_in", "in place"),
    ("mlp_in", "rewritten"),
)


def _preference(entry: SiteRoute) -> int:
    """Return a route's place in the order of preference; of equals the first found is taken."""
    if entry.rewriter is None:
        return _PREFERENCE.index((entry.site, "in place"))
    if (entry.site, entry.rewriter.name) in _PREFERENCE:
        return _PREFERENCE.index((entry.site, entry.rewriter.name))
    return _PREFERENCE.index((entry.site, "rewritten"))


def _spell(entry: SiteRoute) -> str:
    """Name a route as the options that ask for it."""
    return entry.site if entry.rewriter is None else f"{entry.site} (--route {entry.route})"


def examine(config: PreTrainedConfig) -> Anatomy:
    """Find every exact route of a configuration's architecture, each proven on its twin.

    Takes a second; touches no weight of the model and none of torch's random state. Raises
    UnsupportedError where transformers has no causal language model for the configuration, where it
    has no list of decoder layers, or where no small twin of it can be made.
    """
    import torch

    with single_thread(), torch.random.fork_rng(devices=[]):
        try:
            return _Examination(config).anatomy()
        except TWIN_ERRORS as error:
            raise UnsupportedError(
                f"{config.model_type}: no small twin of this architecture can be made and run, so "
                f"nothing can be proven on it ({one_line(error)})"
            ) from error


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
                index: self.structures.get(kind, LayerStructure(self.layers, None, None, None))
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

    def anatomy(self) -> Anatomy:
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
        )

    def insertion(self) -> SiteRoute:
        """Find and prove what an extra layer can hold; see `Anatomy.insertion`."""
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
            else:
                slots[layer] = wanted
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

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        return parameter_shapes(self.real)

    def _hosts(self, site: str) -> tuple[list[SiteRoute], list[str]]:
        """Try every host of the table that can express the configuration."""
        routes = []
        hosts, reasons = find_hosts(self.config)
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
        slots = {layer: host.slots_of(layer) for layer in range(self.layer_count)}
        created = host.new_parameters(self.config)
        pushed = tuple(slot.bias for parts in slots.values() for slot in parts)
        return SiteRoute(
            site=site,
            route="host",
            kind="write",
            flags=host.flags(self.config),
            slots=slots,
            new_parameters=created,
            twin=self.twin.prove_rewriting(self.twin_structure, site, host, layers),
            layers=tuple(range(self.layer_count)),
            rewriter=host,
            rewritten=Outline(host.name, pushed, tuple(created)),
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
