"""Which sites of an architecture can take a push exactly, by which route, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.errors import StrictDataclassError

from bake.anatomy.flags import (
    FlagEffect,
    added_parameters,
    find_bias_flags,
    parameter_shapes,
)
from bake.anatomy.insertion import Insertion, find_insertion
from bake.anatomy.rewriting import Rewriter
from bake.anatomy.slots import (
    Proposal,
    SlotKind,
    find_input_norms,
    measure_attention_scale,
    propose_slots,
)
from bake.anatomy.structure import find_decoder_layers, find_structure
from bake.anatomy.twin import Twin, TwinVerdict
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
from bake.errors import UnsupportedError
from bake.loading import build_on_meta, single_thread
from bake.sites import (
    DESCRIPTIONS,
    SITES,
    LayerStructure,
    Slot,
    capture_location,
    check_site,
    suits,
)

if TYPE_CHECKING:
    from torch import nn
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
        `auto` considers only sites that suit it. route: `native`, `flag`, `host` or `insert`; with
        `auto` the base is not given extra layers. host: the name of one rewriter. target: only routes
        that are known to survive in that engine. Raises UnsupportedError with the reason and what
        works instead.
        """
        if target is not None:
            check_engine(target)
        if site != "auto":
            check_site(site)
        if route not in ROUTES:
            raise UnsupportedError(f"unknown route {route!r}; the routes are {', '.join(ROUTES)}")
        if route == "insert":
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
            return min(candidates, key=lambda entry: _PREFERENCE.index(entry.site))
        instead = ", ".join(dict.fromkeys(route.site for route in self.routes)) or NO_SITE
        wanted = "the direction at any site" if site == "auto" else site
        if route != "auto":
            wanted += f" by route {route}"
        reason = self.refusals.get(site, f"no {kind or 'such'} slot suits")
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
                    f"({_one_line(error)})"
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


# The order in which `--site auto` considers sites (DESIGN: residual writes first).
# What to say where nothing is exact: families that were tried and have an exact site.
NO_SITE = (
    "no site (architectures with one: llama, gpt2, qwen2, qwen3, granite, gpt_neox, opt, falcon "
    "and more, see bake inspect)"
)
_PREFERENCE = ("mlp_out", "attn_out", "attn_in", "mlp_in")


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
                f"nothing can be proven on it ({_one_line(error)})"
            ) from error


# What the constructors and forwards of 190 architectures raise when a shrunk configuration does not suit
# them. Each is a refusal with its reason, never a crash; what they hide is said in the message.
TWIN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


class _Examination:
    """The working state of `examine`: the twin, its flags, and the structure they agree on."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        try:
            self.real = build_on_meta(config)
        except ValueError:
            raise UnsupportedError(
                f"transformers has no causal language model for model type {config.model_type!r}"
            ) from None
        self.layers, self.layer_count = find_decoder_layers(self.real)
        self.twin = Twin(config)
        self.effects = find_bias_flags(self.twin.config)
        self.structure = self._structure()

    def anatomy(self) -> Anatomy:
        routes: list[SiteRoute] = []
        refusals: dict[str, str] = {}
        for site in SITES:
            found, reasons = self._routes(site)
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
            self.config, self.twin, lambda: Twin(self.config), self.structure, self.effects
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

    @cached_property
    def flagged(self) -> nn.Module:
        """The twin with every usable flag set at once."""
        return self.twin.with_flags({effect.path: effect.value for effect in self.effects})

    def _structure(self) -> LayerStructure:
        proposed = find_structure(self.twin.model, self.layers, layer=1)
        proposed = replace(proposed, input_norms=find_input_norms(self.twin, proposed))
        scale = measure_attention_scale(self.twin, proposed)
        if scale is None:
            return replace(proposed, before_mlp=None)
        return replace(proposed, attention_scale=scale)

    def _routes(self, site: str) -> tuple[list[SiteRoute], list[str]]:
        try:
            capture_location(site, self.structure)
        except UnsupportedError:
            if site == "attn_out":
                return [], ["attention's output is not simply added to the residual stream"]
            return [], [f"the decoder layer has no module whose activation is {DESCRIPTIONS[site]}"]
        found: list[SiteRoute] = []
        reasons: list[str] = []
        for proposal in propose_slots(self.twin, self.flagged, self.structure, site):
            if any(route.kind == proposal.kind for route in found):
                continue  # One proven slot of a kind is enough.
            if proposal.missing:
                names = ", ".join(proposal.missing)
                reasons.append(f"no flag of the config creates {names}")
                continue
            try:
                route = self._prove(site, proposal)
            except TWIN_ERRORS as error:
                reasons.append(f"the twin cannot be baked ({_one_line(error)})")
                continue
            lacking = self._lacking(route)
            if lacking:
                reasons.append(f"not every decoder layer has it ({lacking} does not exist)")
            elif route.twin.passed:
                found.append(route)
            else:
                reasons.append(str(route.twin.reason))
        if not found and not reasons:
            reasons.append(self._why_no_slot(site))
        return found, reasons

    def _prove(self, site: str, proposal: Proposal) -> SiteRoute:
        flags = self._flags_for(proposal)
        layers = range(len(self.twin.model.get_submodule(self.layers)))  # type: ignore[arg-type]
        slots = {layer: proposal.slots_of(layer) for layer in layers}
        return SiteRoute(
            site=site,
            route="flag" if flags else "native",
            kind=proposal.kind,
            flags=flags,
            slots={layer: proposal.slots_of(layer) for layer in range(self.layer_count)},
            new_parameters=added_parameters(self.config, flags) if flags else {},
            twin=self.twin.prove(self.structure, site, flags, slots),
            layers=tuple(range(self.layer_count)),
        )

    def _lacking(self, route: SiteRoute) -> str | None:
        """Return a slot that some layer of the real model lacks; a small twin cannot show all layers."""
        present = parameter_shapes(self.real).keys() | route.new_parameters.keys()
        for layer in range(self.layer_count):
            for slot in route.slots_of(layer):
                for name in (slot.bias, slot.weight):
                    if name is not None and name not in present:
                        return name
        return None

    def _flags_for(self, proposal: Proposal) -> dict[str, Any]:
        """Return the flags that create the slots; all usable ones if no single flag does."""
        present = {name for name, _ in self.twin.model.named_parameters()}
        wanted = {slot.bias.format(layer=1) for slot in proposal.slots} - present
        needed: dict[str, FlagEffect] = {}
        for name in sorted(wanted):
            creating = [effect for effect in self.effects if name in effect.adds]
            if not creating:
                return {effect.path: effect.value for effect in self.effects}
            needed[creating[0].path] = creating[0]
        return {path: effect.value for path, effect in needed.items()}

    def _why_no_slot(self, site: str) -> str:
        block = self.structure.attention if site == "attn_out" else self.structure.mlp
        tried = ", ".join(effect.path for effect in self.effects) or "none that creates one"
        return f"{block} has no bias that moves only this activation (bias flags of the config: {tried})"
