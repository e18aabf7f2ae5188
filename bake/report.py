"""What a person reads on the terminal: tables and summaries of the values that the stages returned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bake.engines import describe_survivals
from bake.loading import auto_class
from bake.sites import DESCRIPTIONS, SITES
from bake.wording import list_numbers

if TYPE_CHECKING:
    from bake.anatomy import Anatomy, SiteRoute
    from bake.anatomy.catalogue import CatalogueEntry
    from bake.cost import Estimate
    from bake.direction import Direction
    from bake.equivalence import Equivalence
    from bake.norms import ActivationNorms
    from bake.pipeline import Export
    from bake.prompt_sets import PromptSet, ShownSet
    from bake.separation import Separation
    from bake.thin import ThinExport
    from bake.unembedding import Reading

SHOWN_SHARDS = 4


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
) -> str:
    """Return a plain table: the first `text_columns` columns left, the others right aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def describe_export(result: Export) -> str:
    """Return the summary of an export: the layers, the proof, the files, how to load them."""
    parts = [
        *_describe_push(result),
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
    parts += [
        "",
        f"from transformers import {loader}, AutoTokenizer",
        f'model = {loader}.from_pretrained("{where}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
    ]
    return "\n".join(parts)


def describe_thin(result: ThinExport) -> str:
    """Return the summary of a thin export: the layers, what was written, what is still needed."""
    base = result.base.to_dict()
    where = base["id"] + (f" at revision {base['revision']}" if base["revision"] else "")
    size = sum(shard.size for shard in result.needs) / 1e9
    rows = [(shard.base_file, shard.name) for shard in result.needs[:SHOWN_SHARDS]]
    parts = [
        *_describe_push(result),
        "",
        "NOT verified: a thin bake holds none of its base's weights",
        "",
        f"written to {result.output} ({len(result.files) + 1} files); it needs {len(result.needs)} "
        f"shards of {where} ({size:.1f} GB), copied or linked in under these names:",
        "",
        format_table(("base's file", "name here"), rows),
    ]
    if len(result.needs) > SHOWN_SHARDS:
        parts.append(f"… and {len(result.needs) - SHOWN_SHARDS} more, listed in bake.json")
    return "\n".join([*parts, "", f"then: bake verify {result.output} --base MODEL"])


def describe_direction(direction: Direction, separation: Separation | None) -> str:
    """Return what was found, and the table of how well it separates pairs."""
    known = direction.metadata
    count = len(direction.vectors)
    story = (
        f"{count} direction{'s' * (count > 1)} of width {direction.hidden_size} at {direction.site}"
    )
    if "method" in known and "pairs" in known:
        story += f", by {known['method']} over {known['pairs']} pairs (token: {known.get('token')})"
    lines = [story]
    if separation is None:
        return lines[0]
    where = (
        f"by folds: each of the {separation.pairs} pairs by a direction found without its fold"
        if separation.folds
        else f"on {separation.pairs} held-out pairs"
    )
    rows = [
        (
            str(entry.layer),
            f"{entry.accuracy:.1%}",
            "{:.0%} to {:.0%}".format(*entry.interval),
            f"{entry.threshold_accuracy:.1%}",
            _figure(entry.stability),
            _figure(entry.neighbour),
            f"{entry.relative_norm:.3f}",
        )
        for entry in separation.layers
    ]
    header = (
        "layer",
        "separates",
        "95 % interval",
        "by threshold",
        "halves",
        "next layer",
        "norm/μ",
    )
    return "\n".join([*lines, f"separation {where}", "", format_table(header, rows)])


def describe_reading(direction: Direction, separation: Separation | None, reading: Reading) -> str:
    """Return what a direction says: its tokens, its cosines to others, and how well it separates."""
    parts = [describe_direction(direction, separation)]
    if reading.layers:
        rows = [
            (
                "all" if entry.layer is None else str(entry.layer),
                kind,
                " ".join(repr(score.token) for score in scores),
            )
            for entry in reading.layers
            for kind, scores in (("raised", entry.raised), ("lowered", entry.lowered))
        ]
        width = max(len(layer) for layer, _, _ in rows)
        parts.append(
            "\n".join(f"{layer:<{width}}  {kind:<7}  {tokens}" for layer, kind, tokens in rows)
        )
    if reading.cosines:
        layers = sorted(
            {layer for row in reading.cosines.values() for layer in row},
            key=lambda layer: -1 if layer is None else layer,
        )
        table = [
            (
                "all" if layer is None else str(layer),
                *(_figure(row.get(layer)) for row in reading.cosines.values()),
            )
            for layer in layers
        ]
        parts.append(format_table(("cosine, layer", *reading.cosines), table))
    return "\n\n".join(parts)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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


def _describe_push(result: Export | ThinExport) -> list[str]:
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


def describe_equivalence(found: Equivalence) -> str:
    """Return the figures of a proof, and its verdict."""
    rows = [
        ("mechanism (exact slots, float32)", f"{found.mechanism_error:.1e}", "1e-04"),
        *_as_stored(found),
        ("representation of the push", f"{found.representation_error:.1e}", ""),
        ("KL in the stored dtype (nats)", f"{found.kl:.1e}", ""),
        ("same most likely token", f"{found.top1_agreement:.1%}", ""),
        ("effect (standard deviations)", f"{found.effect:.2g}", ""),
        ("loads cleanly", "yes" if found.loading_info_clean else "no", "yes"),
        ("greedy tokens equal", "yes" if found.greedy_equal else "no", "yes"),
    ]
    verdict = "equivalent to the hooked model" if found.passed else "NOT equivalent"
    table = format_table(("equivalence", "found", "bound"), rows)
    lines = [table, verdict]
    if found.canary:
        lines += [
            f"canary: {found.canary.prompt!r}",
            f"  base:  {found.canary.base!r}",
            f"  baked: {found.canary.baked!r}",
        ]
    return "\n".join(lines)


def describe_norms(norms: ActivationNorms) -> str:
    """Return the table of a calibration."""
    rows = [
        (
            str(entry.layer),
            f"{entry.mean:.4g}",
            f"{entry.median:.4g}",
            f"{entry.spread:.3g}",
            str(entry.tokens),
            str(entry.dropped),
        )
        for entry in norms.layers
    ]
    header = ("layer", "mean", "median", "spread", "tokens", "dropped")
    return f"activation norms at {norms.site}\n\n{format_table(header, rows)}"


def _json(value: object) -> str:
    """Return a config value as config.json has it; a list of one value many times in short."""
    if isinstance(value, list) and len(value) > 3 and len({repr(item) for item in value}) == 1:
        return f"[{_json(value[0])}] × {len(value)}"
    return str(value) if isinstance(value, str) else json.dumps(value)


def describe_anatomy(anatomy: Anatomy) -> str:
    """Return what `bake inspect` says: every site, how it is exact or why it is not."""
    lines = [
        f"{anatomy.architecture} ({anatomy.model_type}): {anatomy.layer_count} layers, "
        f"hidden size {anatomy.hidden_size}",
        f"auto takes {_name_route(anatomy.automatic)}",
    ]
    for site in SITES:
        lines += ["", f"{site}: {DESCRIPTIONS[site]}"]
        here = [route for route in anatomy.routes if route.site == site]
        for route in here:
            changes = ", ".join(_config_changes(route))
            where = (
                f", in layers {list_numbers(route.layers)} only"
                if len(route.layers) < anatomy.layer_count
                else ""
            )
            lines += [
                f"  exact, {route.route}: {route.describe()}{where}",
                f"    config: {changes or 'unchanged'}; {_cost_of(route)}; on the twin "
                f"{route.twin.push_error:.0e} from the hook",
                f"    {describe_survivals(anatomy.survivals(route), brief=True)}",
            ]
        if site in anatomy.refusals:
            no = "no other way" if here else "no"
            lines.append(f"  {no}: {anatomy.refusals[site]}")
    if "insert" in anatomy.refusals:
        lines += ["", f"extra layers (--route insert): no: {anatomy.refusals['insert']}"]
    return "\n".join(lines)


def describe_catalogue(entries: Sequence[CatalogueEntry]) -> str:
    """Return the table of `bake inspect --all`, with totals for each site."""
    rows = []
    for entry in entries:
        for route in entry.routes:
            how = f"{route.route} ({' + '.join(route.flags)})" if route.flags else route.route
            rows.append((entry.model_type, entry.site, how, ", ".join(route.slots), route.layers))
        if entry.refusal is not None:
            rows.append((entry.model_type, entry.site, "no", _shortened(entry.refusal), ""))
    totals = []
    for site in SITES:
        here = [entry for entry in entries if entry.site == site]
        first = [entry.routes[0].route if entry.routes else "none" for entry in here]
        totals.append(
            (site, *(str(first.count(name)) for name in ("native", "flag", "host", "none")))
        )
    return "\n\n".join(
        [
            format_table(
                ("model type", "site", "route", "slots, or the reason", "layers"),
                rows,
                text_columns=4,
            ),
            format_table(("site", "native", "by a flag", "by a host", "none"), totals),
        ]
    )


def _shortened(reason: str, length: int = 90) -> str:
    return reason if len(reason) <= length else f"{reason[: length - 1]}…"


def describe_sets(sets: Sequence[PromptSet]) -> str:
    """Return the table of the shipped sets; the purpose stands last, because it is a sentence."""
    table = format_table(
        ("name", "kind", "count"), [(found.name, found.kind, str(found.count)) for found in sets]
    )
    purposes = ("what it is for", *[found.description for found in sets])
    return "\n".join(
        f"{line}  {purpose}" for line, purpose in zip(table.splitlines(), purposes, strict=True)
    )


def describe_set(shown: ShownSet) -> str:
    """Return a set's texts, or its pairs as a line with + and one with -; a gap where lines are many."""
    if shown.about.kind == "pairs":
        return "\n\n".join(f"+ {positive}\n- {negative}" for positive, negative in shown.entries)
    texts = [text for (text,) in shown.entries]
    return ("\n\n" if any("\n" in text for text in texts) else "\n").join(texts)


def _name_route(route: SiteRoute | None) -> str:
    """Say in a few words what is taken where nothing is asked for."""
    if route is None:
        return "nothing: no site is exact; what is said below of extra layers has to be asked for"
    host = f" {route.rewriter.name}" if route.rewriter is not None else ""
    return f"{route.site}, {route.route}{host}"


def _config_changes(route: SiteRoute) -> Iterator[str]:
    """Yield what a route sets in the config, as people read it."""
    if route.route == "insert":
        yield "one more layer for each pushed one"
    yield from (f"{key}: {_json(value)}" for key, value in route.flags.items())


def _cost_of(route: SiteRoute) -> str:
    """Say what a route costs the baked model."""
    if route.route == "insert":
        return "only with --route insert"
    return f"adds {route.added_values:,} values, no compute to speak of"
