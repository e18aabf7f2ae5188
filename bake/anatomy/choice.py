"""What is known of an architecture, and which of its exact routes is taken.

How the routes are found is not its business (`bake.anatomy.examination`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.anatomy.routes import ROUTES, SiteRoute
from bake.engines.survival import (
    Survival,
    check_engine,
    describe_survivals,
    known_types,
    survival_of,
    survivals,
    to_values,
)
from bake.errors import UnsupportedError
from bake.sites import (
    INPUT_SITES,
    RESIDUAL_SITES,
    LayerStructure,
    check_site,
    is_usable_at,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bake.anatomy.writes import Ablatable


@dataclass(frozen=True)
class Anatomy:
    """What bake knows of an architecture: its layers, the exact routes, and the refusals.

    rotation: of the checkpoint's config.json, see `bake.engines.survival.Outline`.
    """

    architecture: str
    model_type: str
    layer_count: int
    hidden_size: int
    structure: LayerStructure
    prefix: str
    routes: tuple[SiteRoute, ...]
    refusals: Mapping[str, str]
    config: PreTrainedConfig = field(repr=False, compare=False)
    prove_insertion: Callable[[], SiteRoute] = field(repr=False, compare=False)
    prove_ablation: Callable[[], Ablatable] = field(repr=False, compare=False)
    rotation: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

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

        kind: "norm" or "projection" where a site has both, "value" for what only this takes. found_at: the
        site of a given direction; `auto` considers only sites that suit it. target: only routes that are
        known to survive in that engine. route: `native`, `flag`, `host` or `insert`; with `auto` the base
        is not given extra layers. host: the name of one rewriter. Raises UnsupportedError with the reason
        and what works instead.
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
            and (site != "auto" or found_at is None or is_usable_at(found_at, entry.site))
            and (not entry.on_request or route != "auto" or host is not None or kind == "value")
            and (route in ("auto", entry.route))
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
        limited = (entry for entry in self.routes if entry.on_request and entry.site == asked)
        if route == "auto" and (held := next(limited, None)) is not None:
            reason = f"it is {held.describe()}, which is done on request only"
        remedy = self._remedy(found_at) if site == "auto" and route == "auto" else ""
        raise UnsupportedError(
            f"{self.model_type} cannot take {wanted} exactly: {reason}; exact here: {instead}{remedy}"
        )

    def _remedy(self, found_at: str | None) -> str:
        """Say what to do with a direction that was found where nothing is exact; "" where none was."""
        elsewhere = next((entry.site for entry in self.routes if entry.site in INPUT_SITES), None)
        if found_at is None or elsewhere is None or found_at not in RESIDUAL_SITES:
            return ""
        return (
            f": find it there (bake direction --site {elsewhere}), convert it (--site {elsewhere} "
            "--convert-site), or keep it in the residual stream at the price of compute (--route insert)"
        )

    @property
    def automatic(self) -> SiteRoute | None:
        """What `--site auto` takes; None where nothing is exact."""
        try:
            return self.choose("auto")
        except UnsupportedError:
            return None

    def survivals(self, route: SiteRoute) -> tuple[Survival, ...]:
        """Say what every engine does with a bake by one of the routes."""
        return survivals(route.outline(self.model_type, self.rotation))

    def _surviving(self, candidates: list[SiteRoute], target: str) -> list[SiteRoute]:
        """Keep the routes that survive in an engine; raise UnsupportedError where none is known to."""
        judged = [
            (route, survival_of(target, route.outline(self.model_type, self.rotation)))
            for route in self.routes
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
        return self.prove_insertion()

    @cached_property
    def ablation(self) -> Ablatable:
        """What can be taken out exactly, proven on the twin when it is first asked for."""
        return self.prove_ablation()

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
        if site == "auto" and found_at is not None and not is_usable_at(found_at, found.site):
            raise UnsupportedError(
                f"the direction was found at {found_at}, and an inserted layer adds at {found.site}; "
                f"find it there (bake direction --site {found.site})"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        auto = self.automatic
        return {
            "architecture": self.architecture,
            "model_type": self.model_type,
            "layer_count": self.layer_count,
            "hidden_size": self.hidden_size,
            "structure": asdict(self.structure),
            "auto": {"site": auto.site, "route": auto.route} if auto else None,
            "routes": [
                {**route.to_dict(), "survives": to_values(self.survivals(route))}
                for route in self.routes
            ],
            "refusals": dict(self.refusals),
            "ablation": self.ablation.to_dict(),
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
    if entry.kind == "value":
        return f"{entry.site} (--slot value)"
    return entry.site if entry.rewriter is None else f"{entry.site} (--route {entry.route})"
