"""`bake ablate`: a direction is taken out of the weights, proven, and described like any bake."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bake import hub
from bake.anatomy.base import Base, load_base
from bake.anatomy.parts import find_parts, parse_heads, parse_neurons
from bake.card.render import render_record
from bake.checkpoint.writer import WrittenWeights, explain_links
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.directions.subspace import fit_to_scope, span
from bake.errors import BakeError, UnsupportedError
from bake.io.hashing import hash_files
from bake.io.output_files import CARD_FILE, DIRECTION_FILE, RESULT_FILE, number_file
from bake.io.staging import check_output, staged_directory
from bake.models.streaming import Placement, choose_placement
from bake.pipeline.ablation_record import describe_ablation, write_means
from bake.pipeline.about import About, describe_about
from bake.pipeline.decision import extract, extraction_options
from bake.pipeline.export import open_for_export, write
from bake.pipeline.given_directions import (
    GivenDirection,
    check_strengths,
    fit_each,
    read_directions,
)
from bake.pipeline.publishing import check_access, publish
from bake.pipeline.recipe import Recipe, make_recipe
from bake.pipeline.record import describe_left_out, encode_result
from bake.plan.ablation import AblationPlan
from bake.plan.means import plan_removal
from bake.plan.undo_record import describe_undo
from bake.proof.ablation import prove_ablation
from bake.proof.equivalence import Equivalence
from bake.proof.plain_process import kept_plain_process
from bake.strength.means import measure_means
from bake.support.html import show
from bake.support.processes import divide, is_main, leave_to_main
from bake.support.progress import announce, track_bytes, warn
from bake.support.text import did_you_mean
from bake.support.timing import Stopwatch, peak_memory
from bake.sweeps.auto import read_trial_texts
from bake.sweeps.layer_choice import LayerChoice, choose_layer
from bake.sweeps.measurements import Texts
from bake.texts.held_out import read_divided
from bake.texts.pairs import ContrastPair, read_pairs
from bake.texts.prompts import read_prompts
from bake.texts.tokenizer import keep_tokenizer
from bake.writes import SCOPES, Ablation, Removal

# The options that no other command has, and what their values are.
_OWN: dict[str, Any] = {
    "scope": str,
    "strength": int | float,
    "from_layer": int,
    "heads": str,
    "neurons": str,
    "mean": bool,
}
SITE = "mlp_out"  # where directions are found: after a whole layer's writes


@dataclass(frozen=True)
class AblationRecipe:
    """What `bake ablate` is asked for.

    shared: the options that it has in common with `bake export`; there `direction` and `added` are the
    directions of the subspace. from_layer: the layer whose direction is taken out everywhere. mean: heads
    or neurons write their mean.
    """

    shared: Recipe
    scope: str = "stream"
    strength: float = 1.0
    from_layer: int | None = None
    heads: str | None = None
    neurons: str | None = None
    mean: bool = False

    @property
    def silences(self) -> bool:
        """Whether heads or neurons are named, and no direction is taken out."""
        return self.heads is not None or self.neurons is not None

    @property
    def chooses_layer(self) -> bool:
        """Whether the layer whose direction is taken out is for bake to choose, on held-out pairs."""
        return bool(self.shared.pairs) and self.scope == "stream" and self.from_layer is None

    def check(self) -> None:
        """Raise BakeError for options that contradict each other, before any work starts."""
        if self.silences:
            self._check_parts()
            return
        self.shared.check()
        if self.mean:
            raise BakeError("--mean is for --heads or --neurons: give one of them, or leave it out")
        self._check_prompts()
        if self.scope not in SCOPES:
            hint = f"one of {', '.join(SCOPES)}{did_you_mean(self.scope, SCOPES)}"
            raise BakeError(f"unknown scope {self.scope!r}; {hint}")
        if self.strength == 0 or not math.isfinite(self.strength):
            raise BakeError(f"strength {self.strength:g}: it must be finite and not zero")
        if self.scope == "writes":
            return
        self._check_stream()

    def _check_parts(self) -> None:
        if self.heads is not None:
            parse_heads(self.heads)
        if self.neurons is not None:
            parse_neurons(self.neurons)
        if self.mean and self.heads is not None and self.neurons is not None:
            raise BakeError(
                "--mean takes heads or neurons: their means go into other biases; bake one, then the other"
            )
        self._check_prompts()
        given = {
            "--direction": self.shared.direction,
            "--pairs": self.shared.pairs,
            "--layers": self.shared.layers,
            "--from-layer": self.from_layer,
            "--scope": self.scope != "stream",
            "--strength": self.strength != 1,
            "--band": self.shared.band != Recipe.band,
        }
        idle = next((name for name, value in given.items() if value not in (None, False)), None)
        if idle is not None:
            raise BakeError(f"{idle} has no effect with --heads and --neurons; leave it out")
        self.shared.check_choices()

    def _check_prompts(self) -> None:
        if self.shared.prompts != Recipe.prompts and not self.mean:
            raise BakeError("--prompts is what --mean is measured on; give it, or leave it out")

    def _check_stream(self) -> None:
        place = "--band" if self.shared.band != Recipe.band else "--layers"
        if self.shared.layers is not None or self.shared.band != Recipe.band:
            raise UnsupportedError(
                f"{place} with --scope stream: a stream without the direction in some layers only is no "
                "edit of weights, for what later layers write would have to depend on what earlier ones "
                "wrote; take --scope writes for some layers, or leave it out for all"
            )
        if self.strength != 1:
            raise UnsupportedError(
                f"strength {self.strength:g} with --scope stream: what is taken out once is taken out "
                "again by every later write, so no edit of weights keeps a share of it; take --scope "
                "writes, or strength 1"
            )


@dataclass(frozen=True)
class Ablated:
    """What an ablation made. `output` is the directory, everything else is in its bake.json too."""

    output: Path
    base: Base
    plan: AblationPlan
    directions: tuple[Direction, ...]
    about: About
    choice: LayerChoice | None
    equivalence: Equivalence
    files: Mapping[str, Mapping[str, Any]]
    timings: Mapping[str, float]
    peak_memory: int
    publication: hub.Publication | None = None

    def __repr__(self) -> str:
        return f"<Ablated: {self.summary}; {self.output}>"

    def _repr_html_(self) -> str:
        samples = [(s.opening, s.base, s.baked) for s in self.equivalence.samples]
        notes = [self.plan.describe(), f"written to {self.output}"]
        return show(f"Ablated: {self.summary}", ("opening", "base", "ablated"), samples, notes)

    @property
    def summary(self) -> str:
        """The ablation in a few words: the base, what was taken out of what, and whether it is proven."""
        state = "equivalent to the hooked model" if self.equivalence.passed else "NOT equivalent"
        return f"{self.base.named()['id']}, {self.plan.describe()}, {state}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        published = {"publication": self.publication.to_dict()} if self.publication else {}
        return {
            "output": str(self.output),
            **published,
            **describe_ablation(self.base, self.plan, self.directions, self.about, self.choice),
            "equivalence": self.equivalence.to_dict(),
            "files": dict(self.files),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }


def make_ablation(values: Mapping[str, Any]) -> AblationRecipe:
    """Build the recipe from the command's options; raise BakeError for a value of another kind."""
    own = {name: values[name] for name in _OWN if values.get(name) is not None}
    for name, value in own.items():
        if isinstance(value, bool) != (_OWN[name] is bool) or not isinstance(value, _OWN[name]):
            raise BakeError(
                f"{name} is {value!r}; give {getattr(_OWN[name], '__name__', 'a number')}"
            )
    rest = {name: value for name, value in values.items() if name not in _OWN}
    return AblationRecipe(make_recipe({**rest, "multiplier": 1.0, "site": SITE}), **own)


def ablate(recipe: AblationRecipe) -> Ablated:
    """Take directions out of a checkpoint: decide, write, prove. See `bake ablate --help`.

    Raises a BakeError that names what is wrong; then nothing is left at the output path.
    """
    recipe.check()
    shared = recipe.shared
    clock = Stopwatch(stages_of(recipe))
    output = check_output(Path(shared.output), overwrite=shared.overwrite)
    check_access(shared, clock)
    placement = choose_placement(shared.device_map, shared.max_memory)
    extraction_options(shared)
    given, (pairs, trial) = read_directions(shared), read_pairs_and_trial(recipe)
    check_strengths(given)
    if placement is not None and placement.parallel:
        raise BakeError("bake ablate has no --device-map tp: give auto, or leave it out")
    with kept_plain_process(start=placement is None and is_main()):
        base = open_for_export(shared, output, clock)
        base.tokenizer  # noqa: B018  One that cannot be loaded is refused before the work.
        directions, removal, choice = decide(recipe, base, given, pairs, trial, placement, clock)
        leave_to_main()
        plan = plan_removal(base.checkpoint, base.anatomy, removal, dtype=shared.dtype)
        announce(plan.describe())
        if (untied := plan.untied()) is not None:
            announce(untied)
        about = describe_about(shared, directions[0] if directions else None)
        with staged_directory(
            output, overwrite=shared.overwrite, base_directory=base.checkpoint.source
        ) as staging:
            written = write(base, plan, staging, shared.shards, clock)
            with clock.stage("tokenizer"):
                note = keep_tokenizer(base.tokenizer, staging)
            with clock.stage("prove"):
                proof = prove_ablation(
                    base, staging, plan, allow_rounding=shared.allow_rounding, placement=placement
                )
                proof.raise_if_failed()
            undo = describe_undo(
                base.checkpoint, plan, written.sources, tokenizer_changed=note is not None
            )
            record = {
                **describe_ablation(base, plan, directions, about, choice),
                "undo": undo,
                "equivalence": proof.to_dict(),
            }
            write_means(removal, staging)
            files = describe(record, directions, staging, written, clock)
    for warning in proof.warnings:
        warn(warning)
    links = explain_links(base.checkpoint, written, shared.shards)
    left_out = [entry.describe() for entry in describe_left_out(base, plan)]
    for sentence in filter(None, (note, links, *left_out)):
        announce(sentence)
    publication = publish(output, shared, clock)
    return Ablated(
        *(output, base, plan, tuple(directions), about, choice, proof, files),
        *(clock.seconds, peak_memory(), publication),
    )


def stages_of(recipe: AblationRecipe) -> tuple[str, ...]:
    """Return the stages of an ablation that the user is told of, in order."""
    found = ("load", "direction") if recipe.shared.pairs else ()
    found = ("load", "calibrate") if recipe.mean else found
    return (
        *("checkpoint", "anatomy", *found),
        *(("layer",) if recipe.chooses_layer else ()),
        *("write", "prove", "hash"),
        *(("publish",) if recipe.shared.push_to_hub else ()),
    )


def read_pairs_and_trial(recipe: AblationRecipe) -> tuple[Sequence[ContrastPair], Texts | None]:
    """Read the pairs that a direction is found from, and the texts that its layer is chosen on.

    There are none of the latter where the user names the layer, where each layer's writes lose their own,
    and where the pairs are too few to keep some of them out.
    """
    shared = recipe.shared
    if not recipe.chooses_layer:
        return list(read_pairs(shared.pairs)) if shared.pairs else [], None
    pairs, judged = read_divided(shared.pairs, shared.held_out)
    return pairs, read_trial_texts(None, judged, shared.chat_template) if judged else None


def decide(
    recipe: AblationRecipe,
    base: Base,
    given: Sequence[GivenDirection],
    pairs: Sequence[ContrastPair],
    trial: Texts | None,
    placement: Placement | None,
    clock: Stopwatch,
) -> tuple[list[Direction], Removal, LayerChoice | None]:
    """Return what is taken out, the directions that it is made of, and why they are of this layer.

    There are no directions for heads and neurons, and no choice where the user made it.
    """
    anatomy = base.anatomy
    if recipe.silences:
        heads = () if recipe.heads is None else parse_heads(recipe.heads)
        neurons = () if recipe.neurons is None else parse_neurons(recipe.neurons)
        silence = find_parts(anatomy, heads, neurons)
        if recipe.mean:
            prompts = read_prompts(recipe.shared.prompts)
            with clock.stage("load"):
                loaded = load_base(base, placement)
            with clock.stage("calibrate"):
                means = measure_means(loaded, silence, loaded.batches(divide(prompts)))
            silence = replace(silence, means=means)
        return [], silence, None
    writes = anatomy.ablation.choose(recipe.scope, anatomy.model_type)
    layers = _choose_layers(recipe, base)
    choice: LayerChoice | None = None
    if given:
        found = [entry.direction for entry in fit_each(base, given, recipe.shared)]
    else:
        with clock.stage("load"):
            loaded = load_base(base, placement)
        with clock.stage("direction"):
            every = range(anatomy.layer_count)
            found = [extract(base, loaded, recipe.shared, pairs, SITE, every)]
        if trial is not None:
            with clock.stage("layer"):
                choice = choose_layer(loaded, writes, found[0], trial)
                announce(choice.describe())
    from_layer = recipe.from_layer if choice is None else choice.layer
    directions = [fit_to_scope(each, recipe.scope, from_layer) for each in found]
    basis = span(directions, layers, anatomy.hidden_size)
    return directions, Ablation(basis, recipe.scope, recipe.strength), choice


def _choose_layers(recipe: AblationRecipe, base: Base) -> Sequence[int]:
    if recipe.scope == "stream":
        return range(base.anatomy.layer_count)
    layers = recipe.shared.place.chosen_layers(base.anatomy.layer_count)
    if not layers:
        raise BakeError("the band holds no layer; give a wider one")
    return layers


def describe(
    record: Mapping[str, Any],
    directions: Sequence[Direction],
    staging: Path,
    written: WrittenWeights,
    clock: Stopwatch,
) -> Mapping[str, Mapping[str, Any]]:
    """Write directions, card and `bake.json` beside the weights; return every file's hash."""
    with clock.stage("describe"):
        for index, direction in enumerate(directions):
            (staging / number_file(DIRECTION_FILE, index)).write_bytes(direction_bytes(direction))
        (staging / CARD_FILE).write_text(render_record(record), encoding="utf-8")
    with clock.stage("hash"), track_bytes(written.size, "hashing") as progress:
        files = hash_files(staging, known=written.known_sha256, progress=progress)
    text = encode_result({**record, "files": files})
    (staging / RESULT_FILE).write_text(text, encoding="utf-8")
    return files
