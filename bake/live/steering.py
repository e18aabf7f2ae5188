"""A model in memory and all that pushing it takes: at any strength, in any layers, at once.

What a setting of the knobs means is a recipe, and the push is computed from that recipe as an export
computes it: what was heard is what `bake export --recipe` bakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bake.anatomy.base import AnyBase, load_base
from bake.directions.extract import OPTIMIZE
from bake.directions.sum import parse_reference
from bake.errors import BakeError
from bake.models.streaming import Placement
from bake.options.declaration import write_command
from bake.options.export import EXPORT
from bake.pipeline.decision import (
    Inputs,
    decide_push,
    find_direction,
    find_norms,
    read_inputs,
    saved_norms,
)
from bake.pipeline.given_directions import GivenDirection, fit_each, join
from bake.pipeline.recipe import Recipe
from bake.plan.destination import (
    Destination,
    check_direction,
    choose_destination,
    choose_layers,
)
from bake.support.timing import Stopwatch
from bake.sweeps.arms import Arm
from bake.sweeps.auto import BOUNDS
from bake.sweeps.cost_curve import cost_of, cross, shorten
from bake.sweeps.design import BASE
from bake.sweeps.measured_law import MEASURED_LAW, follow_measured_law
from bake.sweeps.measurements import measure_neutral
from bake.texts.prompts import read_prompts

if TYPE_CHECKING:
    from bake.directions.direction import Direction
    from bake.models.forward import LanguageModel
    from bake.strength.coefficients import Push
    from bake.strength.norms import ActivationNorms

T = TypeVar("T")
# Nats: the 95th percentile of KL on neutral text at the strength that is heard first.
USUAL_COST = BOUNDS.kl
_TRIED = (0.1, 0.3, 1.0, 3.0)  # |m|, all in one batch
_NEUTRAL = 3  # texts: enough for a first strength, and a second of work on a small model
_RECIPE_ONLY = ("overwrite", "push_to_hub", "output")  # What a knob has nothing to say about.


@dataclass(frozen=True)
class Setting:
    """What the knobs say. None, or no strengths: as the recipe has it.

    multiplier: m; 0 is the base. band: per cent of the depth. layers: "14" or "3-5,8", instead of a band.
    strengths: of each direction of a sum.
    """

    multiplier: float
    band: str | None = None
    layers: str | None = None
    strengths: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Steering:
    """A model in memory with its direction and norms, and a push for every setting.

    recipe: what was asked for; its multiplier is not looked at. given: the directions that it names, as
    they fit the model; () where one is found from pairs. norms: None where they are measured, or saved.
    """

    base: AnyBase
    loaded: LanguageModel
    recipe: Recipe
    inputs: Inputs
    given: tuple[GivenDirection, ...]
    destination: Destination
    norms: ActivationNorms | None = None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def site(self) -> str:
        """The site where the push is added."""
        return self.destination.site

    @property
    def names(self) -> tuple[str, ...]:
        """What the directions are called: the files, or the pairs."""
        named = [str(entry.reference) for entry in self.given] or [str(self.recipe.pairs)]
        return tuple(Path(name).stem if Path(name).suffix else name for name in named)

    @property
    def layers(self) -> Sequence[int]:
        """Every layer that can be pushed: the route's, of which there is a vector and a norm."""
        able = list(self.destination.route.layers)
        if self.given:
            own = [layer for layer in join(self.given, self.recipe).vectors if layer is not None]
            able = [layer for layer in able if not own or layer in own]
        if self.norms is not None:
            known = self.norms.values()
            able = [layer for layer in able if layer in known]
        return able

    def recipe_at(self, setting: Setting) -> Recipe:
        """Return the recipe of a setting. Raises BakeError for what no export takes."""
        changes: dict[str, Any] = {"multiplier": setting.multiplier}
        if setting.band is not None:
            changes |= {"band": setting.band, "layers": None}
        if setting.layers is not None:
            changes |= {"layers": setting.layers, "band": EXPORT["band"].default}
        if setting.strengths:
            changes |= self._mixed(setting)
        found = replace(self.recipe, **changes)
        found.check()
        return found

    def _mixed(self, setting: Setting) -> dict[str, Any]:
        """Return how a recipe names the directions at their strengths; those of none are left out."""
        if len(setting.strengths) != len(self.given):
            raise BakeError(
                f"{len(setting.strengths)} strengths are given for {len(self.given)} directions"
            )
        mixed = [
            (str(entry.reference), strength)
            for entry, strength in zip(self.given, setting.strengths, strict=True)
            if strength
        ]
        if not mixed:
            raise BakeError("every direction's strength is zero: nothing is left to push along")
        if len(mixed) == 1:  # One alone has no strength but m.
            ((reference, strength),) = mixed
            return {
                "direction": reference,
                "added": (),
                "multiplier": setting.multiplier * strength,
                "orthogonalize": False,
            }
        first, *others = (f"{reference}:{strength:.6g}" for reference, strength in mixed)
        return {"direction": first, "added": tuple(others)}

    def push(self, setting: Setting) -> Push | None:
        """Return the push of a setting; None for m = 0, the base.

        Raises BakeError for a setting that no export takes.
        """
        if setting.multiplier == 0:
            return None
        recipe = self.recipe_at(setting)
        multiplier = recipe.given_multiplier
        assert multiplier is not None
        unit = replace(recipe, multiplier=1.0)
        return self._once(unit, lambda: self._at_one(unit)).at(multiplier)

    def arm(self, setting: Setting, name: str | None = None) -> Arm:
        """Return what a setting is compared as, by default under the name "m = 0.5"."""
        push = self.push(setting)
        if push is None:
            return Arm(name or BASE, "base")
        named = name or f"m = {setting.multiplier:g}"
        return Arm(
            named,
            "direction",
            setting.multiplier,
            self.site,
            push.law,
            push.band,
            push=push.vectors,
        )

    def material(self, setting: Setting) -> tuple[Direction, ActivationNorms]:
        """Return the direction and the norms that a setting's push follows from."""
        recipe = self.recipe_at(setting)
        layers, _ = choose_layers(self.base.anatomy, recipe.place, self.destination.route)
        return self._direction(recipe, layers), self._norms(recipe, layers)

    def _at_one(self, recipe: Recipe) -> Push:
        """Return a recipe's push at m = 1."""
        anatomy, route = self.base.anatomy, self.destination.route
        layers, coefficients = choose_layers(anatomy, recipe.place, route)
        direction = self._direction(recipe, layers)
        check_direction(direction, layers, anatomy)
        wanted = replace(self.destination, layers=layers, coefficients=coefficients)
        norms = self._norms(recipe, layers)
        push = decide_push(recipe, wanted, self.loaded.hidden_size, direction, norms)
        if recipe.law == MEASURED_LAW:
            assert self.inputs.trial_texts is not None
            push = follow_measured_law(self.loaded, self.site, push, self.inputs.trial_texts)
        return push

    def _direction(self, recipe: Recipe, layers: Sequence[int]) -> Direction:
        """Return the direction of a recipe: the given ones at its strengths, or what the pairs give.

        From pairs it is found in all layers up to the last one of these, so that another band costs little;
        but for `optimize`, which finds one push for the layers that it is asked for.
        """
        if self.given:
            known = {str(entry.reference): entry for entry in self.given}
            named = [(str(recipe.direction), 1.0)]
            if recipe.added:
                named = [parse_reference(text) for text in (str(recipe.direction), *recipe.added)]
            mixed = [replace(known[name], strength=strength) for name, strength in named]
            return self._found(recipe, layers, join(mixed, recipe))
        found_in = tuple(layers) if recipe.method == OPTIMIZE else self._up_to(layers)
        return self._once(("direction", found_in), lambda: self._found(recipe, found_in, None))

    def _up_to(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return the layers that can be pushed, up to the last one of these: no later one has to run."""
        return tuple(layer for layer in self.layers if layer <= max(layers))

    def _found(self, recipe: Recipe, layers: Sequence[int], given: Direction | None) -> Direction:
        pairs = self.inputs.pairs
        return find_direction(
            self.base, self.loaded, recipe, self.site, layers, given, pairs, judged=False
        )

    def _norms(self, recipe: Recipe, layers: Sequence[int]) -> ActivationNorms:
        """Return the norms of layers: given, saved, or measured, as directions are found."""
        norms = self.norms or saved_norms(
            self.base, recipe, replace(self.destination, layers=layers)
        )
        if norms is None:
            measured = self._up_to(layers)
            norms = self._once(
                ("norms", measured),
                lambda: find_norms(self.loaded, recipe, self.site, measured, self.inputs.prompts),
            )
        chosen = tuple(each for each in norms.layers if each.layer in layers)
        if len(chosen) < len(layers):
            missing = set(layers) - {each.layer for each in chosen}
            raise BakeError(f"the norms that were given have none of layer {min(missing)}")
        return replace(norms, layers=chosen)

    def _once(self, key: Any, work: Callable[[], T]) -> T:
        """Return what was worked out under a key, or work it out."""
        if key not in self._known:
            self._known[key] = work()
        found: T = self._known[key]
        return found

    def usual_multiplier(self, target: float = USUAL_COST) -> float:
        """Return about the |m| that costs so much on neutral text, measured on a few texts in one batch.

        target: nats, the 95th percentile of KL(base ‖ steered). Whoever bakes has it measured on more, by
        --multiplier auto.
        """
        costs = self.neutral_costs([Setting(size) for size in _TRIED])
        return shorten(cross(dict(zip(_TRIED, costs, strict=True)), target))

    def neutral_costs(self, settings: Sequence[Setting]) -> list[float]:
        """Return what settings cost on a few neutral texts, all in one batch.

        In nats: the 95th percentile of KL(base ‖ steered).
        """
        arms = [Arm(BASE, "base")]
        for number, setting in enumerate(settings):
            arms.append(replace(self.arm(setting), name=f"{number}"))
        texts = read_prompts("neutral")[:_NEUTRAL]
        template = self.recipe.chat_template
        measured = measure_neutral(self.loaded, arms, texts, chat_template=template)
        return [cost_of(measured[arm.name]["kl"]) for arm in arms[1:]]

    def recipe_values(self, setting: Setting) -> dict[str, Any]:
        """Return a setting as the keys of a recipe for `bake export --recipe`, without defaults."""
        recipe = self.recipe_at(setting)
        values = {
            each.name: getattr(recipe, each.name)
            for each in fields(Recipe)
            if each.name not in _RECIPE_ONLY and getattr(recipe, each.name) != each.default
        }
        several = values.pop("added", ())
        if several:
            values["direction"] = [values["direction"], *several]
        return values

    def recipe_text(self, setting: Setting) -> str:
        """Return the recipe file of a setting."""
        import yaml

        head = "# As it was heard; bake it with: bake export --recipe FILE\n"
        values = self.recipe_values(setting)
        return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def command(self, setting: Setting) -> str:
        """Return the line that bakes a setting."""
        values = self.recipe_values(setting)
        return write_command(EXPORT, values, whole=True)


def prepare(
    recipe: Recipe,
    base: AnyBase,
    inputs: Inputs | None = None,
    *,
    norms: ActivationNorms | None = None,
    placement: Placement | None = None,
    clock: Stopwatch | None = None,
) -> Steering:
    """Load a base and find what pushing it as a recipe says takes: direction, norms, the site's route.

    inputs: what `read_inputs` read. norms: instead of measuring. Raises a BakeError where `bake export`
    would: what has no exact slot cannot be baked, so it is not heard either.
    """
    clock = clock or Stopwatch()
    inputs = inputs or read_inputs(recipe)
    given = fit_each(base, inputs.directions, recipe)
    joined = join(given, recipe) if given else None
    destination = choose_destination(base.anatomy, recipe.place, joined, heard_only=True)
    if norms is not None and (norms.site, norms.hidden_size) != (
        destination.site,
        base.anatomy.hidden_size,
    ):
        raise BakeError(
            f"the norms that were given are of {norms.site}, {norms.hidden_size} wide; what is needed are "
            f"those of {destination.site}, {base.anatomy.hidden_size} wide: bake.calibrate measures them"
        )
    with clock.stage("load"):
        loaded = load_base(base, placement)
    steering = Steering(base, loaded, recipe, inputs, given, destination, norms)
    with clock.stage("calibrate"):
        steering.push(Setting(1.0))
    return steering
