"""What the user wants: the options of `bake export`, from the command line, Python or a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bake.directions.extract import OPTIMIZE
from bake.directions.optimize import KL_WEIGHT, STEPS
from bake.engines.survival import check_engine
from bake.errors import BakeError, UsageError
from bake.hub.identity import check_id
from bake.io.concepts import default_output
from bake.io.foreign_yaml import read_yaml
from bake.options.export import EXPORT, HOW_FOUND, THE_HUB
from bake.plan.destination import Place
from bake.strength.coefficients import (
    DEFAULT_LAW,
    parse_band,
    parse_coefficients,
    parse_layers,
    write_band,
)
from bake.support.progress import announce
from bake.support.text import did_you_mean

AUTO = {"auto": 1, "-auto": -1}  # and which way each pushes
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "float": (float, int),
    "bool": (bool,),
    "int": (int,),
    "tuple[str, ...]": (tuple,),
}
DEFAULT_BAND: str = EXPORT["band"].default
CHOICES = {option.name: option.choices for option in EXPORT.options if option.choices}
# Options that do nothing without another one.
_PUBLISHING = tuple(name for name in EXPORT.group(THE_HUB) if name != "push_to_hub")
_GIVEN = ("keep_scale", "layer_offset", "direction_site")
_FINDING = tuple(name for name in EXPORT.group(HOW_FOUND) if name != "held_out")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides an export. Paths are as the user gave them.

    band: "START:STOP" in per cent of the depth. site: one of the four or "auto". route:
    "native", "flag", "host", "insert", or "auto", which never adds layers. slot: "norm" or "projection"
    where a site has both, else None. target: an engine that the bake has to survive in.
    layers: "14" or "3-5,8" replaces the band. coefficients: "6=0.5,8=1.0" replaces band and law.
    name, description, base_id: what the card says the model is, and which model on the Hub a local base is.
    shards: how base shards without a change get into the output, "copy", "hardlink" or "symlink".
    multiplier: a number, or "auto" ("-auto" the other way) for the best that costs at most `target_kl` on
    neutral text, for which `held_out` names contrast pairs that the direction was not found from; None is
    auto where there are such pairs, else 1. calibration: a file of `bake calibrate`
    instead of measuring. sweep: a directory of `bake sweep` whose figures the card shows. thin: write
    no base shard.
    direction: a file of any format that `formats` reads; layer_offset is added to the layers that
    it names, direction_site overrides its site, keep_scale uses its vectors as long as they are. A list
    of them, each FILE or FILE:STRENGTH, is summed: `added` are those after the first; orthogonalize takes
    from each what the ones before it hold.
    ablate: direction files that are taken out of the residual stream before the push; ablate_layer: whose
    vector of them, where they have one for each layer.
    method, token, chat_template, held_out, from_layer, seed, steps, kl_weight: how a direction is found
    from pairs; they mean what they mean in `bake.directions.extract.ExtractionOptions`.
    """

    model: str
    output: str
    direction: str | None = None
    added: tuple[str, ...] = ()
    ablate: tuple[str, ...] | None = None
    ablate_layer: int | None = None
    orthogonalize: bool = False
    pairs: str | None = None
    layer_offset: int | None = None
    direction_site: str | None = None
    keep_scale: bool = False
    revision: str | None = None
    multiplier: float | str | None = None
    target_kl: float | None = None
    band: str = DEFAULT_BAND
    layers: str | None = None
    law: str = DEFAULT_LAW
    coefficients: str | None = None
    site: str = "auto"
    route: str = "auto"
    slot: str | None = None
    target: str | None = None
    convert_site: bool = False
    method: str = "mean"
    token: str = "last"
    chat_template: str = "auto"
    held_out: str | None = None
    from_layer: int | None = None
    seed: int = 0
    steps: int = STEPS
    kl_weight: float = KL_WEIGHT
    statistic: str = "mean"
    prompts: str = "neutral"
    calibration: str | None = None
    sweep: str | None = None
    name: str | None = None
    description: str | None = None
    base_id: str | None = None
    dtype: str | None = None
    device_map: str | None = None
    max_memory: str | None = None
    allow_rounding: bool = False
    shards: str = "copy"
    thin: bool = False
    overwrite: bool = False
    push_to_hub: str | None = None
    public: bool = False
    create_pr: bool = False
    commit_message: str | None = None
    accept_licence: bool = False

    @property
    def place(self) -> Place:
        """The options on where the push goes."""
        return Place(**{field.name: getattr(self, field.name) for field in fields(Place)})

    def check(self) -> None:
        """Raise BakeError for options that contradict each other, before any work starts."""
        if self.direction is None and self.pairs is None:
            raise UsageError("give one of --direction FILE and --pairs FILE")
        if self.thin and (self.direction is None or self.calibration is None):
            raise BakeError(
                "--thin reads no weights, so it needs --direction FILE and --calibration FILE (the "
                "result of bake calibrate)"
            )
        self.check_choices()

    def check_choices(self) -> None:
        """Raise BakeError for options that contradict each other: all that an estimate needs."""
        if self.direction is not None and self.pairs is not None:
            raise BakeError("give one of --direction FILE and --pairs FILE")
        self._check_values()
        self._check_multiplier()
        self._check_idle()
        self._check_direction()
        if self.thin:
            self._check_thin()

    def _check_values(self) -> None:
        """Raise BakeError for a value that an option does not have."""
        if self.target is not None:
            check_engine(self.target)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                words = name.replace("_", " ")
                hint = f"one of {', '.join(known)}{did_you_mean(value, known)}"
                raise BakeError(f"unknown {words} {value!r}; {hint}")
        parse_band(self.band)
        if self.layers is not None:
            parse_layers(self.layers)
        if self.base_id is not None:
            check_id(self.base_id)
        if self.coefficients is not None:
            parse_coefficients(self.coefficients)

    def _check_idle(self) -> None:
        """Raise BakeError for an option that would do nothing, because of another that is there or not."""
        optimizes = self.method == OPTIMIZE
        for names, works, reason in (
            (_PUBLISHING, self.push_to_hub, "is about publishing; give --push-to-hub REPO_ID with it"),
            (_GIVEN, self.direction, "is about a given direction; give --direction FILE with it"),
            (("orthogonalize",), self.added, "is about several directions; repeat --direction"),
            (("ablate_layer",), self.ablate, "is about what is taken out; give --ablate FILE with it"),
            (_FINDING, self.direction is None, "is about --pairs, and a direction is given"),
            (("steps", "kl_weight"), optimizes, "is about --method optimize; give it, or leave this out"),
            (("law", "band", "layers"), self.coefficients is None, "has no effect with --coefficients"),
            (("band",), self.layers is None, "has no effect with --layers"),
            (
                ("prompts",),
                self.calibration is None or optimizes,
                "is what norms are measured on, and --calibration gives them: leave one out",
            ),
        ):  # fmt: skip
            idle = next((name for name in names if getattr(self, name) != _DEFAULTS[name]), None)
            if idle is not None and not works:
                raise BakeError(f"--{idle.replace('_', '-')} {reason}")

    def _check_direction(self) -> None:
        """Raise BakeError where options on a given direction contradict each other."""
        if self.added and self.convert_site:
            raise BakeError(
                "--convert-site cannot go with several directions; find them at the site that they are "
                "used at (bake direction --site)"
            )
        if self.keep_scale and self.coefficients is not None:
            raise BakeError("give one of --keep-scale and --coefficients; both say how far to push")
        if self.keep_scale and self.law != DEFAULT_LAW:
            raise BakeError(f"--keep-scale takes the place of a law; leave --law {self.law} out")
        if self.keep_scale and self.convert_site:
            raise BakeError(
                "--keep-scale cannot go with --convert-site: a converted direction has no length of "
                "its own"
            )

    @property
    def asks_for_auto(self) -> bool:
        """Whether the multiplier is to be chosen, with or without pairs to judge it on."""
        return isinstance(self.multiplier, str) or self.target_kl is not None

    @property
    def sign(self) -> int:
        """Which way a multiplier that is chosen pushes."""
        return AUTO[self.multiplier] if isinstance(self.multiplier, str) else 1

    @property
    def given_multiplier(self) -> float | None:
        """The multiplier, where it is a number."""
        return float(self.multiplier) if isinstance(self.multiplier, float | int) else None

    def _check_multiplier(self) -> None:
        """Raise BakeError for a multiplier that is zero, not finite or no number."""
        given = self.given_multiplier
        if isinstance(self.multiplier, str) and self.multiplier not in AUTO:
            raise BakeError(
                f"multiplier {self.multiplier!r} is neither a number nor auto nor -auto"
            )
        if given is not None and (given == 0 or not math.isfinite(given)):
            raise BakeError(
                f"multiplier {given:g}: it must be finite and not zero; give a number such as 1.0"
            )
        measured = self.law == "measured"
        if self.held_out is not None and self.pairs is None and given is not None and not measured:
            raise BakeError(
                "--held-out pairs go with --pairs, with --multiplier auto or with --law measured"
            )
        if self.target_kl is not None and given is not None:
            raise BakeError("--target-kl is for --multiplier auto: give one of it and a number")
        if self.target_kl is not None and not 0 < self.target_kl < math.inf:
            raise BakeError(f"--target-kl {self.target_kl:g}: nats above 0, such as 0.5")

    def _check_thin(self) -> None:
        """Raise BakeError where a thin bake would need weights, or a proof that it does not have."""
        for option, given, reason in (
            (
                "--multiplier auto",
                self.asks_for_auto or self.held_out,
                "the sweep that chooses needs the weights; run bake sweep and give a number",
            ),
            ("--law measured", self.law == "measured", "it is measured with the weights"),
            ("--dtype", self.dtype, "storing in another dtype rewrites every base shard"),
            ("--shards", self.shards != "copy", "no base shard is written"),
            ("--ablate", self.ablate, "what is taken out is taken out of the base's matrices"),
            ("--convert-site", self.convert_site, "the conversion reads the norms' weights"),
            (
                "--push-to-hub",
                self.push_to_hub,
                "bake publish sends it when it is written; its card says that it is not proven",
            ),
        ):
            if given:
                raise BakeError(f"--thin cannot go with {option}: {reason}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


_DEFAULTS = {field.name: field.default for field in fields(Recipe)}


def read_recipe(
    path: Path, overrides: Mapping[str, Any], *, without_output: bool = False
) -> Recipe:
    """Read a YAML recipe, its keys Recipe's fields; `overrides` (the command line) win.

    Raises BakeError for a file that is no mapping, an unknown key, or a missing model or output.
    """
    values = read_yaml(path, error=BakeError, remedy="write lines such as model: org/name")
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        meant = did_you_mean(unknown[0].replace("-", "_"), known)
        hint = meant or f"; known: {', '.join(sorted(known))}"
        raise BakeError(f"the recipe {path} has an unknown key {unknown[0]!r}{hint}")
    return make_recipe({**values, **overrides}, without_output=without_output)


def make_recipe(values: Mapping[str, Any], *, without_output: bool = False) -> Recipe:
    """Build a Recipe; raise BakeError where there is no model or a value is of another kind.

    without_output: an estimate needs no output; it is empty where none is given.
    """
    if without_output:
        values = {"output": "", **values}
    if not values.get("model"):
        raise UsageError("no model is given; name it on the command line or in the recipe")
    values = {**values, **_in_words(values)}
    several = values.get("direction")
    if isinstance(several, list | tuple):
        first, *others = several or [None]
        values = {**values, "direction": first, "added": tuple(others)}
    for name in ("added", "ablate"):
        given = values.get(name)
        if isinstance(given, list | str):
            values = {**values, name: (given,) if isinstance(given, str) else tuple(given)}
    for field in fields(Recipe):
        if field.name in values:
            _check_type(field.name, values[field.name], str(field.type))
    if values.get("output") == "" and not without_output:  # It would mean the working directory.
        raise BakeError("output is empty: give a directory, or leave it out")
    if "output" not in values:
        values = {**values, "output": _default_output(values)}
        announce(f"the output goes to ./{values['output']} (--output DIR for another place)")
    return Recipe(**values)


def _in_words(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what Python and YAML may give as numbers, as the command line writes it."""
    written: dict[str, str] = {}
    if isinstance(values.get("token"), int):
        written["token"] = str(values["token"])
    band, layers, given = (values.get(name) for name in ("band", "layers", "coefficients"))
    if isinstance(band, list | tuple):
        written["band"] = write_band(band)
    if isinstance(layers, int | list | tuple | range) and not isinstance(layers, bool):
        listed = [layers] if isinstance(layers, int) else layers
        written["layers"] = ",".join(str(layer) for layer in listed)
    if isinstance(given, Mapping):
        written["coefficients"] = ",".join(f"{layer}={alpha}" for layer, alpha in given.items())
    return written


def _default_output(values: Mapping[str, Any]) -> str:
    """Return the directory of a bake that nobody named: the model's name and the concept's."""
    pairs, direction = values.get("pairs"), values.get("direction")
    multiplier = values.get("multiplier")
    reverse = multiplier == "-auto" or (isinstance(multiplier, float | int) and multiplier < 0)
    named = [pairs] if pairs else [direction, *values.get("added", ())] if direction else []
    return default_output(str(values["model"]), [str(n) for n in named], -1.0 if reverse else 1.0)


def _check_type(name: str, value: Any, declared: str) -> None:
    """Refuse a value of another type than the field's: YAML reads 40:50 as a number of base 60."""
    if value is None and declared.endswith("None"):
        return
    if value == "" and name != "output":  # An estimate has none.
        raise BakeError(f"{name} is empty: give a value, or leave it out")
    expected = tuple(t for name in declared.split(" | ") for t in _TYPES.get(name, ()))
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        hint = f'; write it in quotes, {name}: "40:90"' if name == "band" else ""
        raise BakeError(
            f"{name} is {value!r}, not {' or '.join(t.__name__ for t in expected)}{hint}"
        )
