"""`bake try`: prompts continued at several strengths, or by a base and its bake, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake.anatomy import examine
from bake.anatomy.base import Base, load_base, open_any, open_base
from bake.checkpoint.checkpoint import find_bake, open_checkpoint
from bake.errors import BakeError, UsageError
from bake.io.foreign_yaml import read_yaml
from bake.io.output_files import RESULT_FILE
from bake.io.shipped import find_model
from bake.live.knobs import Knobs, beside_base, make_voices
from bake.live.steering import Steering, prepare
from bake.live.talk import Talk
from bake.live.writing import Continuation, Style, Voice
from bake.models.forward import read_config
from bake.models.streaming import Placement, choose_placement
from bake.pipeline.decision import read_inputs
from bake.pipeline.recipe import Recipe, make_recipe, read_recipe
from bake.pipeline.record import base_name, base_revision, read_result
from bake.sites import RESIDUAL_SITES
from bake.support.html import show
from bake.support.progress import announce
from bake.support.timing import Stopwatch
from bake.sweeps.arms import Arm
from bake.sweeps.design import BASE

_PLACED = ("device_map", "max_memory")
_FROM = ("direction", "pairs", "recipe")
STAGES = ("checkpoint", "anatomy", "load", "calibrate")


@dataclass(frozen=True)
class Answer:
    """What every voice wrote after one prompt."""

    prompt: str
    voices: tuple[Continuation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {"prompt": self.prompt, "voices": [voice.to_dict() for voice in self.voices]}


@dataclass(frozen=True)
class Heard:
    """What was heard: prompts, and what each strength, or base and bake, wrote after them."""

    model: str
    answers: tuple[Answer, ...]
    pushed: Mapping[str, Any]

    def __repr__(self) -> str:
        count = len(self.answers)
        return f"<Heard: {self.model}, {count} prompt{'s' if count != 1 else ''}>"

    def _repr_html_(self) -> str:
        names = [each.voice.name for each in self.answers[0].voices] if self.answers else []
        rows = []
        for answer in self.answers:
            rows.append([answer.prompt, *(each.text for each in answer.voices)])
            rows.append(["", *(describe_figures(each) for each in answer.voices)])
        return show(f"Heard: {self.model}", ["prompt", *names], rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        answers = [answer.to_dict() for answer in self.answers]
        return {"model": self.model, **self.pushed, "answers": answers}


def describe_figures(heard: Continuation) -> str:
    """Say how far a voice strayed from the base, and how likely the base finds what it wrote."""
    if heard.kl is None or heard.perplexity is None:
        return "nothing written"
    perplexity = f"perplexity {heard.perplexity:.3g}"
    return perplexity if heard.voice.is_base else f"KL {heard.kl:.2g} · {perplexity}"


@dataclass
class Session:
    """A model that can be talked with, and what turns its knobs; a bake has none."""

    name: str
    talk: Talk
    knobs: Knobs | None

    def describe(self) -> str:
        """Say in a line what is heard."""
        if self.knobs is not None:
            return self.knobs.describe()
        return " beside ".join(voice.name for voice in self.talk.voices)

    def pushed(self) -> dict[str, Any]:
        """Return what was pushed where, as plain values."""
        if self.knobs is None:
            return {}
        steering = self.knobs.steering
        pushes = [steering.push(setting) for setting in self.knobs.settings()]
        push = next((each for each in pushes if each is not None), None)
        layers = [entry.layer for entry in push.layers] if push else []
        return {
            "site": steering.site,
            "layers": layers,
            "law": push.law if push else None,
            "multipliers": list(self.knobs.multipliers),
        }


def open_session(
    model: Any,
    given: Mapping[str, Any],
    *,
    multipliers: Sequence[float] | None = None,
    style: Style | None = None,
    system: str | None = None,
    base: str | None = None,
    clock: Stopwatch | None = None,
) -> Session:
    """Open what is to be heard.

    model: a path, a Hub id, or (model, tokenizer). given: options of an export, of which direction, pairs
    or recipe say what is pushed; with none of these the model is a bake, heard beside its base. Raises
    BakeError for what cannot be heard.
    """
    style = style or Style()
    style.check()
    clock = clock or Stopwatch(STAGES)
    if not any(given.get(name) for name in _FROM):
        return _open_bake(model, given, multipliers, style, system, base, clock)
    if base is not None:
        raise BakeError("--base is for a bake that is heard beside it; leave it out")
    sizes = None if multipliers is None else check_multipliers(multipliers)
    recipe = recipe_of(model, given)
    steering = open_steering(recipe, model, clock)
    if sizes is None and recipe.multiplier is not None and recipe.given_multiplier:
        sizes = beside_base((recipe.given_multiplier,))
    if sizes is None:
        usual = steering.usual_multiplier()
        announce(f"m = {usual:g} moves neutral text by about 0.7 nats; -m M,… for other strengths")
        sizes = (-usual, 0.0, usual)
    talk = Talk(steering.loaded, [], style, recipe.chat_template, system)
    knobs = Knobs(talk, steering, sizes)
    talk.reset(make_voices(steering, knobs.settings()))
    return Session(str(steering.base.to_dict()["id"]), talk, knobs)


def hear(model: Any, texts: Sequence[str], given: Mapping[str, Any], **own: Any) -> Heard:
    """Open what is to be heard, and say every text to it, one conversation; options: `open_session`."""
    session = open_session(model, given, **own)
    answers = []
    for text in texts:
        *_, last = session.talk.ask(text)
        answers.append(Answer(text, last))
    return Heard(session.name, tuple(answers), session.pushed())


def divide_words(words: Sequence[str], recipe: str | None) -> tuple[str, list[str]]:
    """Return (MODEL, prompts) of a command's words; all are prompts where a recipe names the model."""
    given = [word for word in words if word]
    named = recipe is not None and "model" in read_yaml(
        Path(recipe), error=BakeError, remedy="give a recipe"
    )
    return ("", given) if named or not given else (given[0], given[1:])


def recipe_of(model: Any, given: Mapping[str, Any]) -> Recipe:
    """Return the recipe of options that say what is pushed; its multiplier may be None."""
    values = {name: value for name, value in given.items() if name != "recipe"}
    if isinstance(model, str | Path) and str(model):
        values["model"] = str(model)
    elif not isinstance(model, str | Path):
        values["model"] = str(getattr(model[0].config, "name_or_path", "") or "model")
    file = given.get("recipe")
    if file:
        return read_recipe(Path(str(file)), values, without_output=True)
    return make_recipe(values, without_output=True)


def open_steering(recipe: Recipe, model: Any = "", clock: Stopwatch | None = None) -> Steering:
    """Open the model of a recipe and make it ready to be pushed; model: one in memory, instead."""
    clock = clock or Stopwatch(STAGES)
    wanted = replace(recipe, multiplier=recipe.given_multiplier or 1.0, target_kl=None)
    wanted.check()
    placement = choose_placement(recipe.device_map, recipe.max_memory)
    if placement is not None and placement.parallel:
        raise BakeError(
            "--device-map tp is for measuring; a model is heard in one process: take auto"
        )
    inputs = read_inputs(wanted)
    named = recipe.model if isinstance(model, str | Path) else model
    # The other sites would be examined for nothing, a second on a small model.
    place = recipe.place
    residual = all(entry.direction.site in RESIDUAL_SITES for entry in inputs.directions)
    open_choice = (place.route, place.slot, place.target) == ("auto", None, None)
    briefly = residual and open_choice and place.site in ("auto", "mlp_out")
    opened = open_any(named, recipe.revision, clock, briefly=briefly)
    return prepare(wanted, opened, inputs, placement=placement, clock=clock)


def check_multipliers(multipliers: Sequence[float]) -> tuple[float, ...]:
    """Return strengths to be heard; raise BakeError for none, and for one that is no finite number."""
    if not multipliers or not all(math.isfinite(size) for size in multipliers):
        raise BakeError("--multipliers are finite numbers, such as -1,0,1")
    return beside_base(multipliers)


def _open_bake(
    model: Any,
    given: Mapping[str, Any],
    multipliers: Sequence[float] | None,
    style: Style,
    system: str | None,
    base: str | None,
    clock: Stopwatch,
) -> Session:
    idle = [name for name in given if name not in ("revision", "chat_template", *_PLACED)]
    if not isinstance(model, str | Path) or not str(model):
        raise UsageError("give one of --direction FILE, --pairs FILE and --recipe FILE, or a bake")
    if multipliers is not None or idle:
        option = "--multipliers" if multipliers is not None else f"--{idle[0].replace('_', '-')}"
        raise UsageError(
            f"{option} needs a direction: give one of --direction FILE and --pairs FILE; a bake alone is "
            "heard as it is"
        )
    placement = choose_placement(given.get("device_map"), given.get("max_memory"))
    directory = _find_bake(str(model), given.get("revision"))
    first, second = open_both(directory, base, placement, clock)
    recorded = read_result(directory)
    arm = Arm(f"baked, m = {recorded['multiplier']:g}", "base")
    voices = [Voice(Arm(BASE, "base"), first), Voice(arm, second)]
    talk = Talk(first, voices, style, str(given.get("chat_template", "auto")), system)
    return Session(str(model), talk, None)


def _find_bake(model: str, revision: str | None) -> Path:
    path = Path(find_model(model)).expanduser()
    if path.is_dir() and not (path / RESULT_FILE).exists():
        raise UsageError(
            f"{model} is no bake, so there is nothing to hear it beside: give one of --direction FILE and "
            "--pairs FILE"
        )
    return find_bake(model, revision)


def open_both(
    directory: Path,
    base: str | None = None,
    placement: Placement | None = None,
    clock: Stopwatch | None = None,
) -> tuple[Any, Any]:
    """Load a bake's base and the bake, each as it is stored: (base, baked)."""
    clock = clock or Stopwatch()
    recorded = read_result(directory)
    opened = open_base(base or base_name(recorded, directory), base_revision(recorded, base), clock)
    baked = open_checkpoint(str(directory), allowed=opened.checkpoint.roots)
    with clock.stage("load"):
        first = load_base(opened, placement)
        second = load_base(Base(baked, examine(read_config(baked.directory))), placement)
    return first, second
