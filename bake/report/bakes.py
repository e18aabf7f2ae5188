"""What is said of a bake: what it would cost, what was pushed where, and whether it is proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.checkpoint.loading import auto_class
from bake.pipeline.completion import Unproven
from bake.support.tables import format_table
from bake.support.text import one_line

if TYPE_CHECKING:
    from bake.directions.direction import Direction
    from bake.pipeline.estimate import Estimate
    from bake.pipeline.export import Export
    from bake.proof.cost import Cost
    from bake.proof.equivalence import Equivalence

SHOWN_SHARDS = 4
SHOWN = 200  # characters of a sample


def describe_proven(result: Export) -> str:
    """Return what was pushed where, and the proof."""
    return "\n".join([*_describe_push(result), "", describe_equivalence(result.equivalence)])


def describe_export(result: Export) -> str:
    """Return the summary of an export: the layers, the proof, the files, how to load or complete them."""
    if result.needs:
        return "\n".join([describe_proven(result), "", *_describe_needs(result)])
    parts = [
        describe_proven(result),
        "",
        f"written to {result.output} ({len(result.files) + 1} files)",
    ]
    where = str(result.output)
    if result.publication is not None:
        parts.append(f"published as {result.publication.url} (commit {result.publication.commit})")
        where = result.publication.repo_id
    loader = auto_class(result.base.anatomy.config).__name__
    return "\n".join([*parts, "", *describe_loading(loader, where)])


def describe_loading(loader: str, where: str) -> list[str]:
    """Return the lines that load a bake. loader: the Auto class; where: a directory or a Hub id."""
    return [
        f"from transformers import {loader}, AutoTokenizer",
        f'model = {loader}.from_pretrained("{where}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
    ]


def _describe_needs(result: Export) -> list[str]:
    """Return the lines that say what a thin bake still needs."""
    base = result.base.to_dict()
    where = base["id"] + (f" at revision {base['revision']}" if base["revision"] else "")
    size = sum(shard.size for shard in result.needs) / 1e9
    rows = [(shard.base_file, shard.name) for shard in result.needs[:SHOWN_SHARDS]]
    more = len(result.needs) - SHOWN_SHARDS
    return [
        f"written to {result.output} ({len(result.files) + 1} files); it needs {len(result.needs)} "
        f"shards of {where} ({size:.1f} GB), copied or linked in under these names:",
        "",
        format_table(("base's file", "name here"), rows),
        *([f"… and {more} more, listed in bake.json"] if more > 0 else []),
        "",
        f"then: bake verify {result.output} --base MODEL",
    ]


def _describe_push(result: Export) -> list[str]:
    """Return the lines that say what was pushed where."""
    route, push = result.plan.route, result.push
    rows = [
        (
            str(entry.layer),
            f"{entry.activation_norm:.4g}",
            f"{entry.coefficient:+.4g}",
            f"{100 * entry.relative_influence:.1f} %",
        )
        for entry in push.layers
    ]
    changes = ", ".join(f"{k} = {v!r}" for k, v in result.plan.config_values.items())
    if result.plan.config_removed:
        changes += f"; without {', '.join(result.plan.config_removed)}"
    return [
        f"{result.base.to_dict()['id']} steered at {route.site}, law {push.law}, m = {push.multiplier:g}",
        *([f"first {result.plan.ablation.describe()}"] if result.plan.ablation else []),
        f"slots: {route.describe()}; config: {changes or 'unchanged'}",
        "",
        format_table(("layer", "norm μ", "α", "influence"), rows),
        *_describe_parts(result.direction),
    ]


def _describe_parts(direction: Direction) -> list[str]:
    """Return the table of a sum of directions: what was asked for, and what each gets."""
    if not direction.parts:
        return []
    rows = [
        (
            part["name"],
            f"{part['strength']:+g}",
            f"{part['effective_strength']:+.3f}",
            "{:+.3f} to {:+.3f}".format(*part["effective_range"]),
            f"{part['kept']:.1%}",
        )
        for part in (part.to_dict() for part in direction.parts)
    ]
    header = ("direction", "strength", "effective", "over layers", "kept")
    return ["", format_table(header, rows)]


def _as_stored(found: Equivalence) -> list[tuple[str, str, str]]:
    """Return the rows on what is stored; a mixture of experts is judged with the same experts."""
    stored, bound = f"as stored ({found.stored_dtype})", f"{found.tolerance:.0e}"
    if found.same_experts_error is None:
        return [(stored, f"{found.relative_error:.1e}", bound)]
    return [
        (stored, f"{found.relative_error:.1e}", ""),
        (f"{stored}, the same experts", f"{found.same_experts_error:.1e}", bound),
        ("choices of experts changed", f"{100 * (found.experts_flipped or 0):.2g} %", ""),
    ]


def describe_equivalence(found: Equivalence | Unproven) -> str:
    """Return the figures of a proof, and its verdict; of one that was not made, why."""
    if isinstance(found, Unproven):
        return f"NOT verified: {found.reason}"
    slots, what = ("slots", "the push") if found.remainder is None else ("matrices", "the edits")
    rows = [
        (f"mechanism (exact {slots}, float32)", f"{found.mechanism_error:.1e}", "1e-04"),
        *_as_stored(found),
        (f"representation of {what}", f"{found.representation_error:.1e}", ""),
        ("padded batches", f"{found.padding_leak:.1e}", f"{found.padding_bound:.0e}"),
        ("KL in the stored dtype (nats)", f"{found.kl:.1e}", ""),
        ("same most likely token", f"{found.top1_agreement:.1%}", ""),
        ("effect (standard deviations)", f"{found.effect:.2g}", ""),
        ("loads cleanly", "yes" if found.loading_info_clean else "no", "yes"),
        ("greedy tokens equal", "yes" if found.greedy_equal else "no", "yes"),
    ]
    verdict = "equivalent to the hooked model" if found.passed else "NOT equivalent"
    table = format_table(("equivalence", "found", "bound"), rows)
    lines = [table, verdict]
    if found.remainder:
        lines.append(
            f"remainder, max |x·û| / ‖x‖: {found.remainder.base:.2g} in the base, "
            f"{found.remainder.baked:.1e} in float32 arithmetic, {found.remainder.plain:.1e} as plain "
            f"transformers runs it in {found.stored_dtype}"
        )
    if found.cost:
        lines.append(
            _describe_cost(found.cost, "steered" if found.remainder is None else "ablated")
        )
    if found.canary:
        lines += [
            f"canary: {found.canary.prompt!r}",
            f"  base:  {found.canary.base!r}",
            f"  baked: {found.canary.baked!r}",
        ]
    for sample in found.samples:
        lines += [
            f"> {one_line(sample.opening, SHOWN)}",
            f"  base:  {one_line(sample.base, SHOWN)}",
            f"  baked: {one_line(sample.baked, SHOWN)}",
        ]
    return "\n".join(lines)


def _describe_cost(cost: Cost, state: str) -> str:
    """Return a line on what a bake does to neutral text. state: what the bake is."""
    added = (
        ""
        if cost.accumulated is None
        else f"; the band's pushes add up to {cost.accumulated:.0%} of its last layer's norm"
    )
    return (
        f"cost on neutral text: KL(base ‖ {state}) {cost.kl_mean:.2g} nats, 95th percentile "
        f"{cost.kl_p95:.2g}; same most likely token {cost.top1_agreement:.0%}{added}"
    )


def describe_estimate(found: Estimate) -> str:
    """Return the tables of `bake export --estimate`."""
    changes = ", ".join(f"{k} = {v!r}" for k, v in found.config_changes.items())
    lines = [
        f"{found.base['id']} ({found.architecture}): {found.parameters / 1e9:.3g} billion parameters, "
        f"{_size(found.base_bytes)}",
        f"site {found.site}, route {found.route}: {found.slots}; config: {changes or 'unchanged'}; "
        f"layers {found.layers[0]} to {found.layers[-1]}",
        "",
        format_table(
            ("weight files", "files", "size"),
            [(entry.kind, str(entry.files), _size(entry.bytes)) for entry in found.files],
        ),
        "",
        format_table(
            ("cost", ""),
            [
                (f"written (--shards {found.shards})", _size(found.write_bytes)),
                ("  of it cloned, where the file system can", _size(found.cloned_bytes)),
                ("uploaded, at most", _size(found.upload_bytes)),
                ("peak memory, whole model in float32", _size(found.memory_whole)),
                ("peak memory, layer by layer", _size(found.memory_streamed)),
                *[
                    (f"forward passes to {entry.stage}", f"{entry.forwards:,}")
                    for entry in found.passes
                ],
                ("time, whole model in memory", _duration(found.seconds_whole)),
                ("time, layer by layer", _duration(found.seconds_streamed)),
            ],
        ),
        "",
        "assumed: " + "; ".join(found.assumptions),
    ]
    return "\n".join(lines)


def _size(count: int) -> str:
    """Return bytes in the largest unit that leaves a number above 1."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    """Return seconds in the unit that a person would choose."""
    for unit, factor in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * factor:
            return f"about {seconds / factor:.0f} {unit}"
    return f"about {seconds:.0f} seconds"
