"""The proof of an ablation: does the written checkpoint do what the hooks did, and what is left?

The runs are those of any bake (`bake.proof.observation`). What is stored are whole matrices, so each is
computed again from the base, compared bit for bit, and held at its exact value in float32 for the
mechanism's figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bake.anatomy.base import Base
from bake.checkpoint.checkpoint import open_checkpoint
from bake.hooks import share_watched
from bake.io.work_directory import temporary_directory
from bake.models.forward import choose_greedily, read_config
from bake.models.streaming import Placement, hold
from bake.plan.ablation import AblationPlan
from bake.proof.cost import LEAST_KL, MOST_KL, measure_cost
from bake.proof.equivalence import (
    MAX_PROMPTS,
    MAX_TOKENS,
    MECHANISM_TOLERANCE,
    Equivalence,
    Remainder,
    Stored,
    common_warnings,
    compare_runs,
    loading_failures,
    padding_failures,
    slots_exact,
)
from bake.proof.matrices import TOLERANCES, HookedAblation, Weights, hold_exact, open_weights
from bake.proof.observation import (
    NEW_TOKENS,
    BakedRun,
    PlainRun,
    ProofSetup,
    Reference,
    by_parameter,
    padding_errors,
    run_plain,
    run_reference,
    run_stored_base,
)
from bake.proof.prove import EQUIVALENCE_PROMPTS
from bake.proof.routing import hold_choices
from bake.proof.samples import choose_openings, collect_samples
from bake.texts.prompts import encode, position_limit, read_prompts
from bake.writes import Silence

if TYPE_CHECKING:
    import torch


def prove_ablation(
    base: Base,
    directory: Path,
    plan: AblationPlan,
    *,
    allow_rounding: bool = False,
    placement: Placement | None = None,
    published: tuple[str, str] | None = None,
) -> Equivalence:
    """Prove that `directory` does what the hooked base does, on the shipped equivalence prompts.

    published: (repository, commit) that the plain process loads by its id. Raises EquivalenceError where
    nothing can be compared; what was compared and differs is in the result's `failures`.
    """
    tokenizer = base.tokenizer
    baked = open_checkpoint(str(directory), allowed=base.checkpoint.roots)
    limit = position_limit(read_config(base.checkpoint.directory))
    texts = encode(tokenizer, read_prompts(EQUIVALENCE_PROMPTS), MAX_TOKENS, limit=limit)
    openings = choose_openings(tokenizer)
    weights = open_weights(base, baked, plan)
    with temporary_directory("bake-proof-") as folder:
        setup = ProofSetup(
            HookedAblation(plan.writes, plan.ablation),
            tuple(texts)[:MAX_PROMPTS],
            folder,
            placement=placement,
            published=published,
            openings=tuple(opening.ids for opening in openings),
            watched=_watched(plan),
        )
        reference = run_reference(base.checkpoint.directory, setup)
        plain = run_plain(baked.directory, setup)
        stored_base = run_stored_base(base.checkpoint.directory, setup, plan.stored_dtype, plain)
        run, share, exact, rounding = _run_ablated(baked.directory, setup, weights, reference)
        stored = Stored(
            plan.stored_dtype,
            TOLERANCES[plan.stored_dtype],
            rounding,
            exact and slots_exact(baked, plan),
            measure_cost(reference.base, reference.hooked),
            Remainder(reference.share or 0.0, share, plain.remainder or 0.0)
            if setup.watched
            else None,
        )
        result = compare_runs(stored, tokenizer, setup, reference, plain, stored_base, run)
    samples = collect_samples(tokenizer, openings, reference.written, run.written)
    result = replace(result, rounding_allowed=allow_rounding, samples=samples)
    failures = tuple(_find_failures(result, run, reference, plain))
    return replace(
        result, failures=failures, warnings=tuple(_find_warnings(result, plan, reference))
    )


def _watched(plan: AblationPlan) -> dict[str, torch.Tensor]:
    """Return the modules whose outputs should have nothing of the subspace, with it."""
    writes, ablation = plan.writes, plan.ablation
    if isinstance(ablation, Silence):
        return {}
    if ablation.scope == "stream":
        return {f"{writes.layers}.{layer}": basis for layer, basis in ablation.basis.items()}
    return {
        f"{writes.layers}.{layer}.{block}": basis
        for layer, basis in ablation.basis.items()
        for block in writes.by_layer[layer].blocks
    }


def _run_ablated(
    directory: Path, setup: ProofSetup, weights: Weights, reference: Reference
) -> tuple[BakedRun, float, bool, float]:
    """Run the written directory in float32, as stored and with exact matrices.

    Returns the run, the share of the subspace that is left, and what `hold_exact` found.
    """
    loaded = setup.load(directory, "float32")
    batches = setup.batches(loaded)
    with share_watched(loaded.model, setup.watched) as shares:
        stored = setup.logits("baked", loaded, batches)
    written = setup.write(loaded)
    held = flipped = None
    if reference.choices:
        with hold_choices(reference.choices) as routing:
            held = setup.logits("baked, the same experts", loaded, batches)
        held, flipped = (held, routing.share) if routing.fits else (None, None)
    slots = weights.plan.slot_edits
    exact, rounding = hold_exact(loaded, weights, {edit.parameter for edit in slots})
    hold(loaded.model, loaded.weights, by_parameter(slots, lambda edit: edit.old + edit.delta))
    logits = setup.logits("baked, exact matrices", loaded, batches)
    choices = choose_greedily(loaded, setup.canaries, reference.greedy)
    padding = padding_errors(loaded, setup, reference.padding)
    run = BakedRun(stored, logits, choices, (), padding, written, held, flipped)
    return run, max(shares, default=0.0), exact, rounding


def _find_failures(
    result: Equivalence, run: BakedRun, reference: Reference, plain: PlainRun
) -> Iterator[str]:
    """Yield everything that is wrong, each in a phrase with its remedy."""
    yield from loading_failures(result, run, reference, plain)
    if not result.slots_exact:
        yield "mechanism: a stored matrix is not the base's without the subspace, bit for bit"
    # Written so that a NaN fails.
    if not result.mechanism_error <= MECHANISM_TOLERANCE:
        yield (
            f"mechanism: hooked and ablated differ by {result.mechanism_error:.1e} of the effect "
            f"with exact matrices (bound {MECHANISM_TOLERANCE:.0e}); something else writes to the "
            "residual stream"
        )
    elif not result.greedy_equal:
        yield f"mechanism: greedy continuations of {NEW_TOKENS} tokens differ with exact matrices"
    elif not result.judged_error <= result.tolerance and not result.rounding_allowed:
        yield (
            f"representation: in {result.stored_dtype} the stored model is {result.judged_error:.1e} of "
            f"the effect from the hooked one (bound {result.tolerance:.0e}); try --dtype float32, or "
            "accept it with --allow-rounding"
        )
    if result.mechanism_error <= MECHANISM_TOLERANCE:
        yield from padding_failures(result)


def _find_warnings(result: Equivalence, plan: AblationPlan, reference: Reference) -> Iterator[str]:
    yield from common_warnings(result, reference)
    cost, strength = result.cost, plan.ablation.strength
    if cost is None:
        return
    if not cost.kl_p95 <= MOST_KL:
        remedy = (
            "fewer heads and neurons"
            if isinstance(plan.ablation, Silence)
            else "another layer's direction (--from-layer)"
            if plan.ablation.scope == "stream"
            else f"a strength nearer to 0 than {strength:g}, or fewer layers"
        )
        yield (
            f"taking it out moves neutral text by {cost.kl_p95:.3g} nats (95th percentile of KL; above "
            f"{MOST_KL:g} text comes apart): try {remedy}"
        )
    elif cost.kl_p95 < LEAST_KL:
        yield (
            f"taking it out hardly moves neutral text ({cost.kl_p95:.2g} nats, 95th percentile of KL), "
            "which says nothing of the text that it is about"
        )
