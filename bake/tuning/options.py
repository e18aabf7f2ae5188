"""What `bake tune` is asked for, and the texts and the space that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bake.anatomy import Anatomy, SiteRoute
from bake.directions.activations import parse_token
from bake.errors import BakeError, UnsupportedError, UsageError
from bake.options.tune import TUNED_LAWS, TUNED_METHODS, TUNED_SITES
from bake.sites import RESIDUAL_SITES, is_usable_at
from bake.support.progress import announce
from bake.sweeps.measurements import Texts
from bake.texts.held_out import find_beside, read_divided
from bake.texts.pairs import ContrastPair
from bake.texts.prompts import read_prompts

CHOOSING = 12  # pairs, at most; the others judge
NEUTRAL = 8  # texts that choose, and as many that judge twice over
LEAST_PAIRS = 8


@dataclass(frozen=True)
class TuneOptions:
    """What `bake tune` is asked for; names as on the command line."""

    model: str
    output: str
    pairs: str | None = None
    direction: str | None = None
    held_out: str | None = None
    sites: tuple[str, ...] | None = None
    methods: tuple[str, ...] = TUNED_METHODS
    tokens: tuple[str, ...] = ("last", "mean")
    laws: tuple[str, ...] = TUNED_LAWS
    route: str = "auto"
    target_kl: float = 0.7
    reverse: bool = False
    ablate: bool = False
    minutes: float | None = None
    neutral: str = "neutral"
    prompts: str = "neutral"
    chat_template: str = "auto"
    html: bool = False
    revision: str | None = None
    device_map: str | None = None
    max_memory: str | None = None

    def check(self) -> None:
        """Raise BakeError for what is wrong whatever the model is, before one is opened."""
        if self.pairs is None and self.direction is None:
            raise UsageError("give one of --pairs FILE and --direction FILE")
        if self.pairs is not None and self.direction is not None:
            raise BakeError("give one of --pairs FILE and --direction FILE")
        if not 0 < self.target_kl < math.inf:
            raise BakeError(f"--target-kl {self.target_kl:g}: nats above 0, such as 0.7")
        if self.minutes is not None and not self.minutes >= 0:
            raise BakeError(f"--minutes {self.minutes:g}: a number from 0")
        for name, given, known in (
            ("site", self.sites or (), TUNED_SITES),
            ("method", self.methods, TUNED_METHODS),
            ("law", self.laws, TUNED_LAWS),
        ):
            if not given and name != "site":
                raise BakeError(f"no {name} is given to compare; one of {', '.join(known)}")
            unknown = next((each for each in given if each not in known), None)
            if unknown is not None:
                raise BakeError(f"unknown {name} {unknown!r}; one of {', '.join(known)}")
        if not self.tokens:
            raise BakeError("no token position is given to compare; such as last")
        for token in self.tokens:
            parse_token(token)


@dataclass(frozen=True)
class Material:
    """The texts of a search. pairs: what directions are found from; no text is in two of the three.

    divided: whether those that choose and judge were kept out of the pairs.
    """

    pairs: Sequence[ContrastPair]
    choosing: Texts
    judging: Texts
    divided: bool


def read_material(options: TuneOptions) -> Material:
    """Read and divide the texts. Raises BakeError where there are too few of them."""
    pairs, held_out = read_divided(options.pairs, options.held_out)
    divided = options.pairs is not None and not (options.held_out or find_beside(options.pairs))
    if len(held_out) < LEAST_PAIRS:
        raise BakeError(
            f"bake tune judges on contrast pairs that the direction was not found from, and there are "
            f"{len(held_out)}; give {LEAST_PAIRS} or more with --held-out FILE"
        )
    neutral = read_prompts(options.neutral)
    if len(neutral) < 4:
        raise BakeError(f"{options.neutral} holds {len(neutral)} texts; bake tune needs 4 or more")
    half = min(CHOOSING, len(held_out) // 2)
    few = min(NEUTRAL, len(neutral) // 2)
    return Material(
        pairs,
        Texts(
            tuple(held_out[:half]), tuple(neutral[:few]), (), chat_template=options.chat_template
        ),
        Texts(
            tuple(held_out[half:]),
            tuple(neutral[few : few + 2 * NEUTRAL]),
            (),
            chat_template=options.chat_template,
        ),
        divided,
    )


def choose_routes(
    anatomy: Anatomy, options: TuneOptions, found_at: str | None
) -> Mapping[str, SiteRoute]:
    """Return {site: its route} of the sites to compare.

    Extra layers are among them where the residual stream takes no push otherwise, to say what they would
    give. found_at: where a given direction was found. Raises UnsupportedError where no site is exact, or
    none without extra layers that nobody asked for.
    """
    wanted = options.sites or TUNED_SITES
    usable = [site for site in wanted if found_at is None or is_usable_at(found_at, site)]
    routes: dict[str, SiteRoute] = {}
    for site in usable:
        try:
            routes[site] = anatomy.choose(site)
        except UnsupportedError as error:
            if options.sites:
                announce(f"{site} is left out: {error}")
    if "mlp_out" in usable and not routes.keys() & set(RESIDUAL_SITES):
        try:
            routes = {"mlp_out": anatomy.choose("mlp_out", route="insert"), **routes}
        except UnsupportedError as error:
            announce(f"mlp_out is left out: {error}")
    if options.route != "insert" and {route.route for route in routes.values()} == {"insert"}:
        raise UnsupportedError(
            f"{anatomy.model_type} takes no push at {', '.join(usable)} but in extra layers, which cost "
            "compute: allow them with --route insert, or leave --site out"
        )
    if not routes:
        where = f" of a direction found at {found_at}" if found_at else ""
        raise UnsupportedError(
            f"{anatomy.model_type} takes no push{where} at {', '.join(wanted)}; see bake inspect"
        )
    return routes
