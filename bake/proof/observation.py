"""What the models do: the runs that a proof of equivalence compares, and no judgement.

Four runs, one model in memory at a time: the base in float32, alone and hooked (the reference); the
baked directory in a plain process, in its stored dtype; the base in that dtype, alone and hooked; and
the baked directory in float32, as stored and with its slots held at exact values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bake.anatomy.folding import SlotEdit
from bake.errors import EquivalenceError
from bake.hooks import share_watched, steered
from bake.io.work_directory import temporary_directory
from bake.models.forward import (
    LoadedModel,
    SpareModel,
    choose_greedily,
    compute_logits,
    continue_greedily,
    default_device,
    load_model,
)
from bake.models.padding import PaddingError, PaddingTrial, compare_padding, farthest, plan_trial
from bake.models.streaming import Placement, give_memory_back, hold
from bake.plan.plan import Plan
from bake.proof.plain_process import ask_plain_process
from bake.proof.routing import Choices, hold_choices, record_choices
from bake.sites import LayerStructure
from bake.strength.coefficients import Push
from bake.support.progress import track
from bake.texts.prompts import Encoded, TokenBatch, make_batches, position_limit

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of the logits' standard deviation. Below it float32's own rounding would be taken for an error, so the
# checks scale the push up until its effect is one deviation; folding is linear, so nothing is lost.
SMALL_EFFECT = 0.1
NEW_TOKENS = 20
CANARY_TOKENS = 12
CANARIES = 4
WRITTEN = 16  # tokens of each sample
LOGIT_BYTES = 64 * 1024 * 1024  # of one batch's logits in float32

Logits = list["torch.Tensor"]
Continuations = list[list[int]]
Report = Mapping[str, Sequence[str]]


class Intervention(Protocol):
    """What the reference does to the base, and the bake to its weights.

    scales: whether its effect can be made larger by a factor, for a comparison.
    """

    @property
    def scales(self) -> bool: ...

    def hooks(
        self, model: nn.Module, *, factor: float = 1.0, mask: torch.Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Return the context in which a model is hooked; mask: (texts, positions), 1 at tokens."""
        ...


@dataclass(frozen=True)
class HookedPush:
    """A push at a site, as an intervention; folding is linear, so it can be scaled.

    first: what is done to the model before it is pushed, which cannot be.
    """

    structure: LayerStructure
    site: str
    push: Push
    first: Intervention | None = None

    @property
    def scales(self) -> bool:
        """Whether the push is all there is."""
        return self.first is None

    @contextmanager
    def hooks(
        self, model: nn.Module, *, factor: float = 1.0, mask: torch.Tensor | None = None
    ) -> Iterator[None]:
        """Return the context in which factor · push is added at the site, where the mask is 1."""
        vectors = self.push.vectors
        before = self.first.hooks(model) if self.first else nullcontext()
        with before, steered(model, self.structure, self.site, vectors, factor=factor, mask=mask):
            yield


@dataclass(frozen=True)
class ProofSetup:
    """What every run is given: the encoded prompts, the intervention, and where things may lie.

    folder: where logits are kept, so that two runs are never in memory together. published: the
    repository and commit that the plain process loads, instead of the directory. spare: the base, where
    it is still in memory. openings: to be continued by base and bake; nothing is judged by them. watched:
    {module: (directions, hidden_size)}, of whose outputs the largest share along the directions is kept.
    """

    intervention: Intervention
    encoded: tuple[Encoded, ...]
    folder: Path
    device: torch.device | None = None
    placement: Placement | None = None
    published: tuple[str, str] | None = None
    spare: SpareModel | None = None
    openings: tuple[tuple[int, ...], ...] = ()
    watched: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def few(self) -> tuple[Encoded, ...]:
        """The prompts that the runs in the stored dtype are given: enough to see, slow on a CPU."""
        return self.encoded[:CANARIES]

    @property
    def canaries(self) -> list[tuple[int, ...]]:
        """The beginnings of the first prompts, to be continued greedily: of one length, in one batch."""
        length = min(CANARY_TOKENS, *(len(text.ids) for text in self.few))
        return [text.ids[:length] for text in self.few]

    def load(self, directory: Path, dtype: str) -> LoadedModel:
        """Load a directory in a dtype, where the setup says weights may be."""
        return load_model(directory, dtype=dtype, device=self.device, placement=self.placement)

    def write(self, loaded: LoadedModel) -> Continuations:
        """Continue the openings; none where each token would read the weights again, or too long ones."""
        limit = position_limit(loaded.config)
        longest = max((len(ids) for ids in self.openings), default=0) + WRITTEN
        if loaded.weights is not None or (limit is not None and longest > limit):
            return []
        return continue_greedily(loaded, self.openings, WRITTEN)

    def batches(self, loaded: LoadedModel) -> list[TokenBatch]:
        """Return the prompts in as few batches as the logits' memory allows."""
        vocabulary = int(loaded.config.get_text_config().vocab_size)
        return make_batches(self.encoded, batch_tokens=max(1, LOGIT_BYTES // (4 * vocabulary)))

    def logits(self, name: str, loaded: LoadedModel, batches: Sequence[TokenBatch]) -> Logits:
        """Compute logits and keep them on disk under a run's name."""
        folder = self.folder / name
        folder.mkdir()
        return compute_logits(loaded, track(batches, name), folder)


@dataclass(frozen=True)
class PaddedReference:
    """The scaled hooked base on texts of unlike length, its push at their tokens and not at padding.

    alone: each text by itself; padded: {how the texts are padded: their logits}.
    """

    trial: PaddingTrial
    alone: Logits
    padded: Mapping[str, Logits]


@dataclass(frozen=True)
class Reference:
    """The base in float32. scaled: hooked with factor · push; max_effect: max|hooked − base|;
    deviation: the standard deviation of the base's logits; greedy: of the scaled hooked model; choices:
    the scaled hooked model's choices of experts, none where it has no routers; written: what the base alone
    writes after the openings; share: the base's, of what is watched.
    """

    base: Logits
    hooked: Logits
    scaled: Logits
    factor: float
    max_effect: float
    deviation: float
    greedy: Continuations
    report: Report
    choices: Choices
    padding: PaddedReference
    written: Continuations
    share: float | None = None


@dataclass(frozen=True)
class StoredBase:
    """The base in the stored dtype, alone and hooked.

    hooked_choices: the hooked model's most likely tokens along the plain process's continuations.
    """

    base: Logits
    hooked: Logits
    greedy: Continuations
    hooked_choices: Continuations


@dataclass(frozen=True)
class PlainRun:
    """What the plain process saw of the baked directory, in its stored dtype.

    quantized: it ran a quantised model as one. failure: why it ran it dequantised, where the quantised
    run was tried and failed. remainder: the largest share of what was watched along its directions.
    """

    logits: Logits
    continuations: Continuations
    report: Report
    quantized: bool = False
    failure: str | None = None
    remainder: float | None = None


@dataclass(frozen=True)
class BakedRun:
    """The baked directory in float32: what is stored, and every slot at exact old + factor · push.

    stored: slots at old + factor · (stored − old), which is what is stored where factor is 1. missing:
    slots that the reloaded model does not have; then `exact` is what is stored. padding: what each way
    of padding does with exact slots, relative to the largest logit. choices: most likely tokens along
    the reference's greedy continuations. written: what is stored writes after the openings. held: `stored`
    with the reference's experts; flipped: the share of choices that were others without; both None where
    the model has no routers, or others than the base.
    """

    stored: Logits
    exact: Logits
    choices: Continuations
    missing: tuple[str, ...]
    padding: Mapping[str, PaddingError]
    written: Continuations
    held: Logits | None = None
    flipped: float | None = None


def run_reference(directory: Path, setup: ProofSetup) -> Reference:
    """Run the base in float32. Raises EquivalenceError for a push that moves nothing."""
    spare = setup.spare.take("float32") if setup.spare else None
    loaded = spare or setup.load(directory, "float32")
    batches = setup.batches(loaded)
    hooks = partial(setup.intervention.hooks, loaded.model)
    with share_watched(loaded.model, setup.watched) as shares:
        base = setup.logits("base", loaded, batches)
    written = setup.write(loaded)
    with hooks(), record_choices() as choices:
        hooked = setup.logits("hooked", loaded, batches)
    effect = farthest(hooked, base)
    if not math.isfinite(effect) or effect == 0:
        found = "nothing" if effect == 0 else "the logits to values that are not finite"
        raise EquivalenceError(
            f"the bake moves {found} on the equivalence prompts, so there is nothing to prove; "
            f"check the direction and the strength"
        )
    deviation = standard_deviation(base)
    small = setup.intervention.scales and effect < SMALL_EFFECT * deviation
    factor = deviation / effect if small else 1.0
    with hooks(factor=factor):
        scaled = hooked
        if factor != 1.0:
            with record_choices() as choices:
                scaled = setup.logits("scaled", loaded, batches)
        greedy = continue_greedily(loaded, setup.canaries, NEW_TOKENS)
    padding = _run_padded_reference(loaded, setup, factor)
    return Reference(
        base,
        hooked,
        scaled,
        factor,
        effect,
        deviation,
        greedy,
        loaded.report,
        choices,
        padding,
        written,
        max(shares, default=None),
    )


def _run_padded_reference(loaded: LoadedModel, setup: ProofSetup, factor: float) -> PaddedReference:
    trial = plan_trial(loaded.model, [text.ids for text in setup.few])
    hooks = partial(setup.intervention.hooks, loaded.model, factor=factor)
    with hooks():
        alone = setup.logits("hooked, alone", loaded, trial.alone)
    padded = {}
    for name, batch in trial.padded.items():
        with hooks(mask=batch.attention_mask):
            padded[name] = setup.logits(f"hooked, padded {name}", loaded, [batch])
    return PaddedReference(trial, alone, padded)


def run_stored_base(directory: Path, setup: ProofSetup, dtype: str, plain: PlainRun) -> StoredBase:
    """Run the base in the stored dtype, in the plain process's batches: one text at a time."""
    loaded = setup.load(directory, dtype)
    batches = make_batches(setup.few, batch_tokens=1)
    base = setup.logits("stored base", loaded, batches)
    greedy = continue_greedily(loaded, setup.canaries, NEW_TOKENS)
    with setup.intervention.hooks(loaded.model):
        hooked = setup.logits("stored hooked", loaded, batches)
        choices = choose_greedily(loaded, setup.canaries, plain.continuations)
    return StoredBase(base, hooked, greedy, choices)


def run_plain(directory: Path, setup: ProofSetup) -> PlainRun:
    """Run the directory in the plain process. Raises EquivalenceError where it cannot load."""
    import torch
    from safetensors.torch import load_file, save_file

    give_memory_back()  # Two processes need memory now.
    with temporary_directory("bake-plain-") as folder:
        request: dict[str, Any] = {
            "directory": setup.published[0] if setup.published else str(directory.resolve()),
            "revision": setup.published[1] if setup.published else None,
            "device": str(setup.device or default_device()),
            "max_memory": setup.placement and setup.placement.to_dict(),
            "prompts": [list(text.ids) for text in setup.few],
            "canaries": [list(ids) for ids in setup.canaries],
            "new_tokens": NEW_TOKENS,
            "threads": torch.get_num_threads(),
            "logits": str(folder / "logits.safetensors"),
            "watched": None,
        }
        if setup.watched:
            request["watched"] = str(folder / "watched.safetensors")
            save_file(
                {name: each.clone() for name, each in setup.watched.items()}, request["watched"]
            )
        result = ask_plain_process(request, folder)
        if result["bake_imported"]:
            raise EquivalenceError("the plain process imported bake, so it proves nothing")
        logits = load_file(folder / "logits.safetensors")
    return PlainRun(
        [logits[str(index)] for index in range(len(setup.few))],
        result["continuations"],
        result["report"],
        result["quantized"],
        result["quantized_run_failed"],
        result["remainder"],
    )


def run_baked(
    directory: Path,
    setup: ProofSetup,
    plan: Plan,
    reference: Reference,
    hold_others: Callable[[LoadedModel], None] = lambda _loaded: None,
) -> BakedRun:
    """Run the baked directory in float32, as stored and with exact slots.

    hold_others: gives what else was edited its exact values.
    """
    loaded = setup.load(directory, "float32")
    batches = setup.batches(loaded)
    factor = reference.factor
    stored = setup.logits("baked", loaded, batches)
    missing = tuple(edit.parameter for edit in plan.slot_edits if not _has(loaded, edit.parameter))
    if missing:
        return BakedRun(stored, stored, [], missing, {}, [])
    written = setup.write(loaded)
    if factor != 1.0:
        rounded = by_parameter(
            plan.slot_edits, lambda e: e.old + factor * (e.stored.double() - e.old)
        )
        hold(loaded.model, loaded.weights, rounded)
        stored = setup.logits("baked, scaled", loaded, batches)
    held: Logits | None = None
    flipped: float | None = None
    if reference.choices:
        with hold_choices(reference.choices) as routing:
            held = setup.logits("baked, the same experts", loaded, batches)
        # An extra layer has a router of its own.
        held, flipped = (held, routing.share) if routing.fits else (None, None)
    hold_others(loaded)
    exact = by_parameter(plan.slot_edits, lambda e: e.old + factor * e.delta)
    hold(loaded.model, loaded.weights, exact)
    logits = setup.logits("baked, exact slots", loaded, batches)
    choices = choose_greedily(loaded, setup.canaries, reference.greedy)
    padding = padding_errors(loaded, setup, reference.padding)
    return BakedRun(stored, logits, choices, missing, padding, written, held, flipped)


def by_parameter(
    slot_edits: Sequence[SlotEdit], value: Callable[[SlotEdit], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return {parameter: value}, slots that are parts of one parameter put together."""
    import torch

    parts: dict[str, list[SlotEdit]] = {}
    for edit in slot_edits:
        parts.setdefault(edit.parameter, []).append(edit)
    return {
        name: value(edits[0])
        if edits[0].slot.part is None
        else torch.stack([value(e) for e in sorted(edits, key=lambda e: e.slot.part or 0)])
        for name, edits in parts.items()
    }


def _has(loaded: LoadedModel, name: str) -> bool:
    try:
        loaded.model.get_parameter(name)
    except AttributeError:
        return False
    return True


def padding_errors(
    loaded: LoadedModel, setup: ProofSetup, reference: PaddedReference
) -> Mapping[str, PaddingError]:
    """Run the reference's padded batches and compare; figures are relative to the largest logit."""
    largest = max(float(logits.abs().max()) for logits in reference.alone)
    return {
        name: compare_padding(
            reference.alone,
            reference.padded[name],
            setup.logits(f"baked, padded {name}", loaded, [batch]),
            max(largest, 1e-12),
        )
        for name, batch in reference.trial.padded.items()
    }


def standard_deviation(logits: Logits) -> float:
    """Return the standard deviation over all texts, positions and tokens, text by text."""
    count = sum(text.numel() for text in logits)
    mean = sum(float(text.double().sum()) for text in logits) / count
    return math.sqrt(sum(float((text.double() - mean).square().sum()) for text in logits) / count)
