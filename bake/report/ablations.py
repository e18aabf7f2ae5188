"""What is said of an ablation: what was taken out of what, what is left, and whether it is proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.checkpoint.loading import auto_class
from bake.report.bakes import describe_equivalence, describe_loading

if TYPE_CHECKING:
    from bake.pipeline.ablate import Ablated


def describe_ablated(result: Ablated) -> str:
    """Return the summary of an ablation: what was edited, the proof, the files, how to load them."""
    changes = ", ".join(f"{k} = {v!r}" for k, v in result.plan.config_changes.items())
    parts = [
        f"{result.base.to_dict()['id']}: {result.plan.describe()}; config: {changes or 'unchanged'}",
        "",
        describe_equivalence(result.equivalence),
        "",
        f"written to {result.output} ({len(result.files) + 1} files)",
    ]
    where = str(result.output)
    if result.publication is not None:
        parts.append(f"published as {result.publication.url} (commit {result.publication.commit})")
        where = result.publication.repo_id
    loader = auto_class(result.base.anatomy.config).__name__
    return "\n".join([*parts, "", *describe_loading(loader, where)])
