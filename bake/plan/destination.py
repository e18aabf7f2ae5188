"""Where the push goes: the site's route, and the layers of the band that it can push."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bake.anatomy import Anatomy, SiteRoute
from bake.anatomy.insertion import Insertion
from bake.directions.direction import ABSENT, Direction
from bake.engines.survival import describe_survivals
from bake.errors import BakeError, DirectionError, UnsupportedError
from bake.sites import check_direction_site, is_usable_at
from bake.strength.coefficients import (
    band_layers,
    band_of,
    parse_band,
    parse_coefficients,
    parse_layers,
)
from bake.support.progress import announce
from bake.support.text import list_numbers


@dataclass(frozen=True)
class Place:
    """What the user says of where a push goes.

    site: one of the four, or "auto". route: "native", "flag", "host", "insert", or "auto", which never adds
    layers. slot: "norm" or "projection" where a site has both. target: an engine that the bake has to
    survive in. convert_site: take a residual direction at an input site. band: "START:STOP" in per cent of
    the depth. layers: "14" or "3-5,8", which replaces the band. coefficients: "6=0.5,8=1.0", which
    replaces both.
    """

    site: str
    route: str
    slot: str | None
    target: str | None
    convert_site: bool
    band: str
    layers: str | None
    coefficients: str | None

    @property
    def named_layers(self) -> Sequence[int] | None:
        """The layers that the user named one by one, in order; None where a band says which."""
        if self.coefficients is not None:
            return sorted(parse_coefficients(self.coefficients))
        return None if self.layers is None else parse_layers(self.layers)

    def chosen_layers(self, layer_count: int) -> Sequence[int]:
        """Return the layers that the user asks for, in order.

        Raises BakeError for one that a model of so many layers does not have, and for an empty band.
        """
        named = self.named_layers
        if named is None:
            return band_layers(layer_count, parse_band(self.band))
        beyond = [layer for layer in named if not 0 <= layer < layer_count]
        if beyond:
            raise BakeError(
                f"layer {beyond[0]} is named; the model has layers 0 to {layer_count - 1}"
            )
        return named


def site_to_read(anatomy: Anatomy, site: str) -> str:
    """Return the site at which a direction is found; "auto" is the one that export takes.

    Says where export would take one at which the direction cannot be used as it is. Raises UnsupportedError
    for "auto" where no site is exact.
    """
    taken = anatomy.automatic
    if site == "auto":
        taken = taken or anatomy.choose("auto")  # Which says why there is none.
        announce(f"site {taken.site}, which bake export takes on this model")
        return taken.site
    if taken is not None and not is_usable_at(site, taken.site):
        announce(
            f"bake export takes {taken.site} on this model, where a direction found at {site} needs "
            f"--convert-site; --site {taken.site} (or auto) finds it there"
        )
    return site


@dataclass(frozen=True)
class Destination:
    """Where a push goes. coefficients: {layer: α at m = 1} where the user gave them, else None."""

    route: SiteRoute
    layers: Sequence[int]
    coefficients: Mapping[int, float] | None

    @property
    def site(self) -> str:
        """The site's name."""
        return self.route.site


def choose_destination(
    anatomy: Anatomy, place: Place, given: Direction | None, *, heard_only: bool = False
) -> Destination:
    """Choose route and layers, and say what was chosen; `given` must have the layers.

    heard_only: nothing is baked yet, so how it would be and where it would survive is not said.

    Raises UnsupportedError where nothing exact is left, DirectionError where the direction lacks a layer.
    """
    route = choose_route(anatomy, place, given, heard_only=heard_only)
    layers, coefficients = choose_layers(anatomy, place, route)
    if isinstance(route.rewriter, Insertion) and not heard_only:
        announce(route.rewriter.describe_cost(len(layers)))
    if given is not None:
        check_direction(given, layers, anatomy)
    return Destination(route, layers, coefficients)


def check_direction(direction: Direction, layers: Sequence[int], anatomy: Anatomy) -> None:
    """Raise DirectionError for another width than the model's, or for a layer that it has no vector for."""
    direction.select([], anatomy.hidden_size)
    own = [layer for layer in direction.vectors if layer is not None]
    missing = [layer for layer in layers if own and layer not in own]
    if missing:
        band = band_of(own, anatomy.layer_count)
        reason = f" ({ABSENT})" if missing[0] in direction.absent else ""
        raise DirectionError(
            f"the direction has no vector for layer {missing[0]}{reason}; it has {list_numbers(own)}, "
            f"of the model's {anatomy.layer_count} layers: choose these, "
            + (f"--band {band}" if band else f"--layers {list_numbers(own).replace(' ', '')}")
        )


def choose_route(
    anatomy: Anatomy, place: Place, given: Direction | None, *, heard_only: bool = False
) -> SiteRoute:
    """Choose the site's route; announce it where the user left it open, and where it survives."""
    found_at = given.site if given else None
    route = anatomy.choose(
        place.site,
        kind=place.slot,
        found_at=found_at,
        target=place.target,
        route=place.route,
    )
    if not heard_only:
        if place.site == "auto" or (place.route == "auto" and route.rewriter is not None):
            announce(f"site {route.site}: {route.describe()}")
        announce(describe_survivals(anatomy.survivals(route)))
    if found_at is not None:
        note = check_direction_site(found_at, route.site, convert=place.convert_site)
        if note:
            announce(note)
    return route


def choose_layers(
    anatomy: Anatomy, place: Place, route: SiteRoute
) -> tuple[Sequence[int], dict[int, float] | None]:
    """Return the pushed layers and, where the user gave them, their coefficients at m = 1.

    Layers of the band that the route cannot push are left out, and announced; a layer that the user
    named is refused. Raises BakeError.
    """
    layers = place.chosen_layers(anatomy.layer_count)
    if place.named_layers is None:
        return layers_within(layers, route.site, route.layers), None
    unable = sorted(set(layers) - set(route.layers))
    if unable:
        raise UnsupportedError(
            f"layer {unable[0]} is named, which cannot take a push at {route.site}; "
            f"layers that can: {list_numbers(route.layers)}"
        )
    return layers, None if place.coefficients is None else parse_coefficients(place.coefficients)


def layers_within(band: Sequence[int], site: str, layers: Sequence[int]) -> Sequence[int]:
    """Return the layers of a band that can take a push at the site; announce those that cannot."""
    able = [layer for layer in band if layer in layers]
    if len(able) == len(band):
        return band
    if not able:
        raise UnsupportedError(
            f"no layer of the band ({list_numbers(band)}) can take a push at {site}; "
            f"layers that can: {list_numbers(layers)}; choose a --band that holds some"
        )
    unable = [layer for layer in band if layer not in layers]
    announce(
        f"{site} is exact in layers {list_numbers(able)} of the band; "
        f"layers {list_numbers(unable)} cannot take a push there and are left as they are"
    )
    return able
