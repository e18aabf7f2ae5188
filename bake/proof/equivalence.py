"""The proof: does the baked checkpoint do what the hooked model does?

`bake.proof.observation` runs the models; here the runs are compared and judged. Two kinds of error are told
apart, because the remedies differ: *mechanism*, the route is wrong, and *representation*, the stored
dtype cannot hold the push.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Add
from bake.checkpoint.quantization import quantization_method
from bake.errors import EquivalenceError
from bake.io.work_directory import temporary_directory
from bake.models.forward import LoadedModel, SpareModel
from bake.models.padding import CAUSE, PaddingError, farthest
from bake.plan.ablation import AblationPlan
from bake.plan.plan import Plan
from bake.proof.canary import Canary, Fork, find_canary, find_forks
from bake.proof.cost import Cost, measure_cost
from bake.proof.matrices import TOLERANCES as MATRICES
from bake.proof.matrices import HookedAblation, Weights, hold_exact
from bake.proof.observation import (
    NEW_TOKENS,
    BakedRun,
    HookedPush,
    Logits,
    PlainRun,
    ProofSetup,
    Reference,
    Report,
    StoredBase,
    run_baked,
    run_plain,
    run_reference,
    run_stored_base,
)
from bake.proof.samples import Sample, choose_openings, collect_samples
from bake.texts.protocols import Tokenizer

if TYPE_CHECKING:
    from bake.models.streaming import Placement
    from bake.sites import LayerStructure
    from bake.strength.coefficients import Push
    from bake.texts.prompts import Encoded

MECHANISM_TOLERANCE = 1e-4
PADDING_TOLERANCE = 1e-4  # relative to the largest logit
# Bounds on the relative error of what is stored: {dtype: (new slots, patched slots)}.
TOLERANCES = {
    "float32": (1e-4, 1e-4),
    "float16": (2e-3, 5e-3),
    "bfloat16": (5e-3, 2e-2),
}
REPRESENTATION_WARNING = 0.02
DROPPED_EFFECT = 0.1  # of the hook's effect; another thread count alone moves logits a little
MAX_PROMPTS, MAX_TOKENS = 8, 32


@dataclass(frozen=True)
class Remainder:
    """max |x·û| / ‖x‖ over positions and modules: how much of x lies in an ablation's subspace.

    x: the stream after each layer, or the writes, by the ablation's scope. base, baked: in float32
    arithmetic, of what is stored. plain: of the plain process, in the stored dtype.
    """

    base: float
    baked: float
    plain: float


@dataclass(frozen=True)
class Equivalence:
    """What the proof showed. Errors are relative to the largest effect of the push on a logit.

    mechanism_error: slots held at exact old + push in float32. relative_error: what is stored, in
    float32 arithmetic. representation_error: of the slots themselves. effect: max_effect in units of
    the logits' standard deviation. plain_effect: how much of the hook's effect the plain process sees,
    near 1 unless the push was dropped. scaled_by: the factor on the push where its effect is too
    small to compare. kl, top1_agreement: the stored dtype against the hooked base in the same dtype,
    in nats and as a share of positions. experts_flipped: of a mixture of experts, the share of choices of
    experts (a token's, in a layer) that the stored push's rounding changes; same_experts_error: the
    relative error with the hooked model's choices held, which is what the tolerance is for there.
    padding: {how a batch is padded: what that does at real tokens}, relative to the largest logit.
    cost: what the push does to neutral text. samples: what base and bake write, greedily, in float32.
    remainder: of an ablation, how much of the subspace is left.
    """

    mechanism_error: float
    relative_error: float
    representation_error: float
    tolerance: float
    max_effect: float
    effect: float
    plain_effect: float
    scaled_by: float
    slots_exact: bool
    loading_info_clean: bool
    loading_info: Report
    greedy_equal: bool
    greedy_equal_stored: bool
    kl: float
    top1_agreement: float
    prompts: int
    stored_dtype: str
    canary: Canary | None
    forks: tuple[Fork, ...] = ()
    cost: Cost | None = None
    samples: tuple[Sample, ...] = ()
    rounding_allowed: bool = False
    experts_flipped: float | None = None
    same_experts_error: float | None = None
    padding: Mapping[str, PaddingError] = field(default_factory=dict)
    remainder: Remainder | None = None
    failures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def judged_error(self) -> float:
        """The relative error that the tolerance is for."""
        error = self.same_experts_error
        return self.relative_error if error is None else error

    @property
    def padding_error(self) -> float:
        """The largest difference between the bake padded and alone, relative to the largest logit."""
        return max((found.error for found in self.padding.values()), default=0.0)

    @property
    def padding_leak(self) -> float:
        """How far the bake's padded batches are from the hooked base's, relative to the largest logit."""
        return self._worst_padding.leak

    @property
    def padding_bound(self) -> float:
        """How far they may be: as far as padding moves the base by itself."""
        return max(PADDING_TOLERANCE, self._worst_padding.base_error)

    @property
    def _worst_padding(self) -> PaddingError:
        return max(
            self.padding.values(),
            key=lambda found: found.leak,
            default=PaddingError(error=0.0, base_error=0.0, leak=0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`, the card and `--json`."""
        return {
            **asdict(self),
            "padding_error": self.padding_error,
            "padding_leak": self.padding_leak,
            "padding_bound": self.padding_bound,
            "passed": self.passed,
        }

    def raise_if_failed(self) -> None:
        """Raise EquivalenceError with every failure in one line."""
        if self.failures:
            raise EquivalenceError("not equivalent: " + "; ".join(self.failures))


def prove_equivalence(
    base: Checkpoint,
    baked: Checkpoint,
    structure: LayerStructure,
    plan: Plan,
    push: Push,
    tokenizer: Tokenizer,
    encoded: Sequence[Encoded],
    *,
    allow_rounding: bool = False,
    placement: Placement | None = None,
    published: tuple[str, str] | None = None,
    spare: SpareModel | None = None,
    weights: Weights | None = None,
) -> Equivalence:
    """Compare a baked directory with the hooked base on prompts that are not the calibration's.

    published: (repository, commit) on the Hub, whose files these are: the plain process loads it by its id.
    spare: the base, where it is still in memory; it is used up. weights: the matrices of what was taken out
    before the push.

    Raises EquivalenceError where nothing can be compared: a push without effect, a baked directory
    that does not load. What was compared and differs is in the result's `failures`.
    """
    dtype = str(plan.slot_edits[0].stored.dtype).removeprefix("torch.")
    texts = tuple(encoded)[:MAX_PROMPTS]
    openings = choose_openings(tokenizer)
    first = None
    if weights is not None:
        first = HookedAblation(weights.plan.writes, weights.plan.ablation, before_push=True)
    stored_right = [True]

    def hold_others(loaded: LoadedModel) -> None:
        if weights is not None:
            pushed = {edit.parameter for edit in plan.slot_edits}
            stored_right[0] = hold_exact(loaded, weights, pushed)[0]

    with temporary_directory("bake-proof-") as folder:
        setup = ProofSetup(
            HookedPush(structure, plan.route.site, push, first),
            texts,
            folder,
            placement=placement,
            published=published,
            spare=spare,
            openings=tuple(opening.ids for opening in openings),
        )
        reference = run_reference(base.directory, setup)
        plain = run_plain(baked.directory, setup)
        stored_base = run_stored_base(base.directory, setup, dtype, plain)
        run = run_baked(baked.directory, setup, plan, reference, hold_others)
        stored = Stored(
            dtype,
            MATRICES[dtype] if weights else TOLERANCES[dtype][0 if plan.slots_are_new else 1],
            plan.representation_error,
            slots_exact(baked, plan) and stored_right[0],
            measure_cost(reference.base, reference.hooked, push, plan.route.site),
        )
        result = compare_runs(stored, tokenizer, setup, reference, plain, stored_base, run)
    samples = collect_samples(tokenizer, openings, reference.written, run.written)
    result = replace(result, rounding_allowed=allow_rounding, samples=samples)
    failures = tuple(_find_failures(result, plan, run, reference, plain))
    return replace(
        result,
        failures=failures,
        warnings=tuple(_find_warnings(result, push, reference, baked, plain)),
    )


@dataclass(frozen=True)
class Stored:
    """What is known of the stored values apart from the runs; see Equivalence for what each figure is."""

    dtype: str
    tolerance: float
    representation_error: float
    exact: bool
    cost: Cost
    remainder: Remainder | None = None


def compare_runs(
    stored: Stored,
    tokenizer: Tokenizer,
    setup: ProofSetup,
    reference: Reference,
    plain: PlainRun,
    stored_base: StoredBase,
    run: BakedRun,
) -> Equivalence:
    """Return every figure of the proof, not yet judged."""
    kl, top1 = _agreement(plain.logits, stored_base.hooked)
    return Equivalence(
        mechanism_error=_relative(run.exact, reference.scaled, reference.base),
        relative_error=_relative(run.stored, reference.scaled, reference.base),
        representation_error=stored.representation_error,
        tolerance=stored.tolerance,
        max_effect=reference.max_effect,
        effect=reference.max_effect / reference.deviation,
        plain_effect=farthest(plain.logits, stored_base.base)
        / max(farthest(stored_base.hooked, stored_base.base), 1e-12),
        scaled_by=reference.factor,
        slots_exact=stored.exact,
        loading_info_clean=not any(_beyond(plain.report, reference.report).values()),
        loading_info=plain.report,
        greedy_equal=run.choices == reference.greedy,
        greedy_equal_stored=plain.continuations == stored_base.hooked_choices,
        padding=run.padding,
        kl=kl,
        top1_agreement=top1,
        prompts=len(setup.encoded),
        stored_dtype=stored.dtype,
        canary=find_canary(tokenizer, setup, stored_base, plain),
        forks=find_forks(tokenizer, setup, reference),
        cost=stored.cost,
        experts_flipped=run.flipped,
        same_experts_error=None
        if run.held is None
        else _relative(run.held, reference.scaled, reference.base),
        remainder=stored.remainder,
    )


def _find_failures(
    result: Equivalence, plan: Plan, run: BakedRun, reference: Reference, plain: PlainRun
) -> Iterator[str]:
    """Yield everything that is wrong, each in a phrase with its remedy."""
    yield from loading_failures(result, run, reference, plain)
    if not result.slots_exact:
        yield (
            "mechanism: a stored slot is not cast(old + push), bit for bit"
            if plan.ablation is None
            else "mechanism: a stored slot or matrix is not what it should be, bit for bit"
        )
    # Written so that a NaN fails.
    rounding = _rounding_host(plan, result)
    if not result.mechanism_error <= MECHANISM_TOLERANCE and rounding:
        yield (
            f"hooked and baked differ by {result.mechanism_error:.1e} of the effect with exact slots "
            f"(bound {MECHANISM_TOLERANCE:.0e}): as {rounding} some weights are rounded in "
            f"{result.stored_dtype}; try --dtype float32, or another site"
        )
    elif not result.mechanism_error <= MECHANISM_TOLERANCE:
        yield (
            f"mechanism: hooked and baked differ by {result.mechanism_error:.1e} of the effect with "
            f"exact slots (bound {MECHANISM_TOLERANCE:.0e}); {plan.route.caveat or 'the route is wrong'}"
        )
    elif not result.greedy_equal:
        yield f"mechanism: greedy continuations of {NEW_TOKENS} tokens differ with exact slots"
    elif not result.judged_error <= result.tolerance and not result.rounding_allowed:
        yield _representation_failure(result, plan)
    if result.mechanism_error <= MECHANISM_TOLERANCE:  # Else a wrong route leaks everywhere.
        yield from padding_failures(result)


def loading_failures(
    result: Equivalence, run: BakedRun, reference: Reference, plain: PlainRun
) -> Iterator[str]:
    """Yield what is wrong with what plain transformers loads, whatever was baked."""
    if result.plain_effect < DROPPED_EFFECT:
        yield "the reloaded model is the base model: the push was dropped on loading"
    if not result.loading_info_clean:
        entries = "; ".join(
            f"{kind.replace('_', ' ')} {_some(names)}"
            for kind, names in _beyond(plain.report, reference.report).items()
            if names
        )
        yield f"transformers does not load it cleanly: {entries}"
    if run.missing:
        yield f"mechanism: the reloaded model has no parameter {_some(run.missing)}"


def padding_failures(result: Equivalence) -> Iterator[str]:
    """Yield the side on which padding reaches real tokens, beyond what it does to the base."""
    leaks = {
        name: found for name, found in result.padding.items() if found.is_beyond(PADDING_TOLERANCE)
    }
    if leaks:
        name, found = max(leaks.items(), key=lambda item: item[1].leak)
        yield (
            f"padded on the {name.partition(',')[0]}, hooked and baked differ by {found.leak:.1e} of "
            f"the largest logit, where padding moves the base by {found.base_error:.1e}: {CAUSE}; "
            f"choose another site"
        )


def _rounding_host(plan: Plan, result: Equivalence) -> str | None:
    """Name the form in which weights besides the slots were rounded; None where none were."""
    rewriter = plan.route.rewriter
    if rewriter is None or rewriter.lossless or result.stored_dtype == "float32":
        return None
    return rewriter.name


def _representation_failure(result: Equivalence, plan: Plan) -> str:
    remedy = "a smaller multiplier" if result.stored_dtype == "float32" else "--dtype float32"
    if not plan.slots_are_new:
        remedy = f"another site or slot, one whose bias is new or small, or {remedy}"
    return (
        f"representation: {result.stored_dtype} holds the push to "
        f"{result.representation_error:.1%} only, and the stored model is "
        f"{result.judged_error:.1e} of the effect from the hooked one (bound "
        f"{result.tolerance:.0e}); try {remedy}, or accept it with --allow-rounding"
    )


def _find_warnings(
    result: Equivalence, push: Push, reference: Reference, baked: Checkpoint, plain: PlainRun
) -> Iterator[str]:
    method = quantization_method(baked.config)
    if method is not None:
        ran = "ran it quantised" if plain.quantized else "ran it dequantised too"
        failed = f" (quantised it failed: {plain.failure})" if plain.failure else ""
        yield f"{method}: the proof is of the dequantised weights; plain transformers {ran}{failed}"
    if result.representation_error > REPRESENTATION_WARNING:
        yield f"{result.stored_dtype} holds the push to {result.representation_error:.1%} only"
    yield from common_warnings(result, reference)
    warning = result.cost.warn(push.multiplier) if result.cost else None
    if warning is not None:
        yield warning


def common_warnings(result: Equivalence, reference: Reference) -> Iterator[str]:
    """Yield what somebody should know of a proof, whatever was baked."""
    if result.experts_flipped:
        yield (
            f"rounding changes {100 * result.experts_flipped:.2g} % of the choices of experts: the "
            f"stored model is {result.relative_error:.1e} of the effect from the hooked one, and "
            f"{result.judged_error:.1e} with the same experts"
        )
    if result.rounding_allowed and not result.judged_error <= result.tolerance:
        yield (
            f"rounding accepted: the stored model is {result.judged_error:.1e} of the effect "
            f"from the hooked one (bound {result.tolerance:.0e})"
        )
    if any(reference.report.values()):
        yield "the base itself does not load cleanly; only what is new counts here"
    if result.canary is None:
        yield "no canary: base and baked continue every equivalence prompt alike"


def slots_exact(baked: Checkpoint, plan: Plan | AblationPlan) -> bool:
    """Whether every slot on disk holds cast(old + push), and every other new parameter zero."""
    import torch

    expected = {edit.name: edit.stored for edit in plan.slot_edits}
    expected |= {edit.name: edit.tensor for edit in plan.edits if isinstance(edit, Add)}
    for name, tensor in expected.items():
        if name not in baked.tensors:
            return False
        found = baked.read(name)
        if found.dtype != tensor.dtype or not torch.equal(found, tensor):
            return False
    return True


def _relative(found: Logits, hooked: Logits, base: Logits) -> float:
    """Return max|found − hooked| / max|hooked − base|."""
    return farthest(found, hooked) / farthest(hooked, base)


def _agreement(found: Logits, expected: Logits) -> tuple[float, float]:
    """Return mean KL(expected ‖ found) in nats per position and the share of equal top tokens."""
    from torch.nn import functional as F

    divergence, agreeing, positions = 0.0, 0, 0
    for left, right in zip(found, expected, strict=True):
        logs = left.log_softmax(-1), right.log_softmax(-1)
        divergence += float(F.kl_div(*logs, reduction="sum", log_target=True))
        agreeing += int((left.argmax(-1) == right.argmax(-1)).sum())
        positions += len(left)
    return max(divergence / positions, 0.0), agreeing / positions


def _beyond(report: Report, base: Report) -> Mapping[str, list[str]]:
    """Return what a loading report has beyond the base's own."""
    return {kind: sorted(set(names) - set(base.get(kind, ()))) for kind, names in report.items()}


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
