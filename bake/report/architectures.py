"""What is said of a model before it is baked: which sites are exact by which route, and why not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bake.anatomy.catalogue import ABLATION
from bake.engines.survival import describe_survivals
from bake.sites import DESCRIPTIONS, RESIDUAL_SITES, SITES
from bake.strength.coefficients import band_layers
from bake.support.tables import format_table
from bake.support.text import list_numbers
from bake.writes import SCOPES

if TYPE_CHECKING:
    from bake.anatomy import Anatomy, SiteRoute
    from bake.anatomy.catalogue import CatalogueEntry


def describe_anatomy(anatomy: Anatomy) -> str:
    """Return what `bake inspect` says: every site, how it is exact or why it is not."""
    lines = [
        f"{anatomy.architecture} ({anatomy.model_type}): {anatomy.layer_count} layers, "
        f"hidden size {anatomy.hidden_size}",
        f"auto takes {_name_route(anatomy.automatic)}",
        *_weaker(anatomy),
    ]
    for site in SITES:
        lines += ["", f"{site}: {DESCRIPTIONS[site]}"]
        here = [route for route in anatomy.routes if route.site == site]
        for route in here:
            changes = ", ".join(_config_changes(route))
            where = (
                f", in layers {list_numbers(route.layers)} only"
                if len(route.layers) < anatomy.layer_count
                else ""
            )
            lines += [
                f"  exact, {route.route}: {route.describe()}{where}",
                f"    config: {changes or 'unchanged'}; {_cost_of(route)}; on the twin "
                f"{route.twin.push_error:.0e} from the hook",
                f"    {describe_survivals(anatomy.survivals(route), brief=True)}",
            ]
        if site in anatomy.refusals:
            no = "no other way" if here else "no"
            lines.append(f"  {no}: {anatomy.refusals[site]}")
    lines += ["", "ablation (bake ablate): a direction taken out instead of added"]
    for scope, verdict in anatomy.ablation.to_dict().items():
        reason = verdict if verdict == "exact" else f"no: {verdict}"
        lines.append(f"  --scope {scope}: {reason}{_head_of(anatomy) if scope == 'stream' else ''}")
    if "insert" in anatomy.refusals:
        lines += ["", f"extra layers (--route insert): no: {anatomy.refusals['insert']}"]
    return "\n".join(lines)


def _head_of(anatomy: Anatomy) -> str:
    """Say what becomes of a head that shares the embedding's matrix."""
    writes = anatomy.ablation.writes
    return "" if writes is None or writes.untying is None else "; the output head is untied"


def _weaker(anatomy: Anatomy) -> Iterator[str]:
    """Yield what to know where nothing in the residual stream can be pushed in place."""
    taken = anatomy.automatic
    if taken is None or taken.site in RESIDUAL_SITES:
        return
    yield (
        f"a push at {taken.site} is normalised anew in every layer and does not add up as one into the "
        "residual stream does: it is weaker, and needs a larger m (--multiplier auto finds it)"
    )
    added = next((route for route in anatomy.routes if route.route == "insert"), None)
    if added is not None:
        pushed = len(band_layers(anatomy.layer_count))
        yield (
            f"--route insert pushes into the residual stream: {pushed} extra layers on the default band, "
            f"{pushed / anatomy.layer_count:.0%} more compute and key-value cache"
        )


def _json(value: object) -> str:
    """Return a config value as config.json has it; a list of one value many times in short."""
    if isinstance(value, list) and len(value) > 3 and len({repr(item) for item in value}) == 1:
        return f"[{_json(value[0])}] × {len(value)}"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _name_route(route: SiteRoute | None) -> str:
    """Say in a few words what is taken where nothing is asked for."""
    if route is None:
        return "nothing: no site is exact; what is said below of extra layers has to be asked for"
    host = f" {route.rewriter.name}" if route.rewriter is not None else ""
    return f"{route.site}, {route.route}{host}"


def _config_changes(route: SiteRoute) -> Iterator[str]:
    """Yield what a route sets in the config, as people read it."""
    if route.route == "insert":
        yield "one more layer for each pushed one"
    yield from (f"{key}: {_json(value)}" for key, value in route.flags.items())


def _cost_of(route: SiteRoute) -> str:
    """Say what a route costs the baked model."""
    if route.route == "insert":
        return "only with --route insert"
    return f"adds {route.added_values:,} values, no compute to speak of"


def describe_entries(entries: Sequence[CatalogueEntry]) -> str:
    """Return the lines of `bake inspect --all` on one architecture: a route each, or a refusal."""
    lines = []
    for entry in entries:
        start = f"{entry.model_type:<28}  {entry.site:<8}"
        for route in entry.routes:
            how = f"{route.route} ({' + '.join(route.flags)})" if route.flags else route.route
            lines.append(f"{start}  {how}: {', '.join(route.slots)}, {route.layers} layers")
        if entry.refusal is not None:
            lines.append(f"{start}  no: {_shortened(entry.refusal)}")
    return "\n".join(lines)


def describe_totals(entries: Sequence[CatalogueEntry]) -> str:
    """Return the table that ends `bake inspect --all`: at each site, architectures by their first route."""
    totals = []
    for site in SITES:
        here = [entry for entry in entries if entry.site == site]
        first = [entry.routes[0].route if entry.routes else "none" for entry in here]
        totals.append(
            (site, *(str(first.count(name)) for name in ("native", "flag", "host", "none")))
        )
    table = format_table(("site", "native", "by a flag", "by a host", "none"), totals)
    ablated = [entry for entry in entries if entry.site == ABLATION]
    counts = (
        f"{sum(any(route.route == scope for route in e.routes) for e in ablated)} by --scope {scope}"
        for scope in SCOPES
    )
    return f"{table}\n\nablation is exact in {', '.join(counts)}, of {len(ablated)} architectures"


def _shortened(reason: str, length: int = 90) -> str:
    return reason if len(reason) <= length else f"{reason[: length - 1]}…"
