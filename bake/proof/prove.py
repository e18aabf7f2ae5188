"""The proof that every bake goes through, on the prompts that ship for it."""

from __future__ import annotations

from pathlib import Path

from bake.anatomy.base import Base
from bake.checkpoint.checkpoint import open_checkpoint
from bake.models.forward import SpareModel, read_config
from bake.models.streaming import Placement
from bake.plan.plan import Plan
from bake.proof.equivalence import MAX_TOKENS, Equivalence, prove_equivalence
from bake.proof.matrices import open_weights
from bake.strength.coefficients import Push
from bake.texts.prompts import (
    encode,
    position_limit,
    read_prompts,
)

EQUIVALENCE_PROMPTS = "equivalence"


def prove(
    base: Base,
    directory: Path,
    plan: Plan,
    push: Push,
    allow_rounding: bool,
    placement: Placement | None = None,
    published: tuple[str, str] | None = None,
    spare: SpareModel | None = None,
) -> Equivalence:
    """Prove that `directory` does what the hooked base does, on the shipped equivalence prompts.

    published: (repository, commit) that the plain process loads by its id. spare: the base, where it is
    still in memory; it is used up.
    """
    baked = open_checkpoint(str(directory), allowed=base.checkpoint.roots)
    return prove_equivalence(
        base.checkpoint,
        baked,
        base.anatomy.structure,
        plan,
        push,
        base.tokenizer,
        encode(
            base.tokenizer,
            read_prompts(EQUIVALENCE_PROMPTS),
            MAX_TOKENS,
            limit=position_limit(read_config(base.checkpoint.directory)),
        ),
        allow_rounding=allow_rounding,
        placement=placement,
        published=published,
        spare=spare,
        weights=open_weights(base, baked, plan.ablation) if plan.ablation else None,
    )
