"""What is said of a direction and of the texts and norms it lives on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bake.support.tables import format_table

if TYPE_CHECKING:
    from bake.directions.direction import Direction
    from bake.directions.logit_lens import Reading
    from bake.directions.separation import Separation
    from bake.strength.norms import ActivationNorms
    from bake.texts.shipped import PromptSet, ShownSet


def describe_direction(direction: Direction, separation: Separation | None) -> str:
    """Return what was found, and the table of how well it separates pairs."""
    known = direction.metadata
    count = len(direction.vectors)
    summary = (
        f"{count} direction{'s' * (count > 1)} of width {direction.hidden_size} at {direction.site}"
    )
    if "method" in known and "pairs" in known:
        pairs = "1 pair" if known["pairs"] == "1" else f"{known['pairs']} pairs"
        summary += f", by {known['method']} over {pairs} (token: {known.get('token')})"
    lines = [summary]
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
    """Return what a direction says: its tokens, its cosines to others, and how well it separates.

    The layers whose tokens read as words come first.
    """
    summary, _, found = describe_direction(direction, separation).partition("\n")
    parts = [summary]
    if reading.layers:
        rows = [
            (
                "all" if entry.layer is None else str(entry.layer),
                kind,
                " ".join(repr(score.token) for score in scores),
            )
            for entry in sorted(reading.layers, key=lambda each: -each.words)
            for kind, scores in (("raised", entry.raised), ("lowered", entry.lowered))
        ]
        width = max(len(layer) for layer, _, _ in rows)
        parts.append(
            "\n".join(f"{layer:<{width}}  {kind:<7}  {tokens}" for layer, kind, tokens in rows)
        )
    parts += [found] if found else []
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
