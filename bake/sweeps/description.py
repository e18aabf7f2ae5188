"""What `bake sweep` says on the terminal: the curve, chance beside it, the window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bake.support.tables import format_table
from bake.sweeps.findings import compare_laws
from bake.sweeps.points import ROW, Point, row_of
from bake.sweeps.results import Trial


def describe(trial: Trial) -> str:
    """Return what a person reads: the curve, chance beside it, the window."""
    found = trial.found
    scored = any(point.score for point in found.points)
    judged = found.judge is not None
    rows = [
        _row(point, scored=scored, judged=judged)
        for point in found.points
        if not point.arm.is_control
    ]
    header = (*ROW, *["score"] * scored, *["judge"] * judged)
    parts = [
        f"{trial.base.to_dict()['id']}: {len(found.points)} arms, "
        f"{len(found.samples)} openings, held-out pairs in nats a token",
        "",
        format_table(header, rows),
        "",
    ]
    if found.specificity is not None:
        parts.append(found.specificity.describe())
    parts += [window.describe() for window in found.windows]
    parts += [beside.describe() for beside in found.ablations]
    if found.agreement is not None:
        parts.append(found.agreement.describe())
    costs = found.laws_at_equal_shift()
    if len(costs) > 1:
        parts.append(f"at equal shift, {compare_laws(costs)}")
    if trial.attribution is not None:
        parts += ["", trial.attribution.describe()]
    parts += ["", f"written to {trial.output}: {', '.join(_written(trial.output))}"]
    if any(variant.injection == "last-token" for variant in found.design.variants):
        parts.append("last-token injection is there to compare with; no weights can do it")
    return "\n".join(parts)


def _written(output: Path) -> Sequence[str]:
    return sorted(
        path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()
    )


def _row(point: Point, *, scored: bool, judged: bool) -> tuple[str, ...]:
    return (
        *row_of(point),
        *[f"{point.score.value:.3g}" if point.score else "-"] * scored,
        *[f"{point.judged.value:.1f}" if point.judged else "-"] * judged,
    )
