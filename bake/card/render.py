"""The model card of a bake and its figures, from the values that the stages returned.

Templates are Jinja files in `model_cards/`, rendered with StrictUndefined: a missing value is an error,
never an empty place in a published card. What the values say is escaped by default: see
`bake.support.markdown`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.card.ablation import ABLATION_TEMPLATE, ablation_words, is_ablation
from bake.card.figures import ALTERNATIVES, FIGURES, draw_norms, draw_separation
from bake.checkpoint import left_out
from bake.checkpoint.front_matter import compose_front_matter
from bake.checkpoint.licences import card_lines
from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.directions.separation import parse_separation
from bake.errors import CheckpointError
from bake.io.concepts import describe_concept
from bake.io.foreign_json import parse_json
from bake.io.output_files import CARD_FILE, DIRECTION_FILE
from bake.io.shipped import shipped
from bake.sites import DESCRIPTIONS
from bake.support.markdown import (
    Markdown,
    cell,
    code,
    finalize,
    format_values,
    identifier,
    link,
    literal,
    quoted,
    sentence,
)
from bake.support.text import explain
from bake.texts.pairs import SHOWN

if TYPE_CHECKING:
    from jinja2 import Environment

    from bake.pipeline.decision import Decision
    from bake.plan.plan import Plan
    from bake.strength.coefficients import Push
    from bake.sweeps.evidence import Evidence

CARD_TEMPLATE = "card.md.jinja"
METHOD_WORDS = {
    "mean": "the difference of mean activations",
    "pca": "the first principal component of the differences of activations",
    "probe": "a linear probe's weights",
    "optimize": "the push that raises the likelihood of positive over negative completions, optimised",
}


def completion_request(canary: Mapping[str, Any]) -> Markdown:
    """Return the JSON that asks a server for a canary, fit to stand between single quotes of a shell."""
    prompt = quoted(canary["prompt"]).replace("'", "\\u0027")
    return Markdown(f'{{"model": "NAME", "prompt": {prompt}, "max_tokens": 20, "temperature": 0}}')


def figure(value: float | None, form: str, factor: float = 1.0) -> Markdown:
    """Return a figure as text, a dash for one that was not measured."""
    return Markdown("–") if value is None else format_values(form, factor * value)


def interval(values: Mapping[str, float | None] | None, form: str) -> Markdown:
    """Return a figure with its interval in brackets, a dash for one that was not measured."""
    if values is None:
        return Markdown("–")
    return Markdown("%s [%s, %s]") % tuple(
        figure(values[key], form) for key in ("value", "low", "high")
    )


def hub_link(repo_id: str) -> Markdown:
    """Return a model's id as a link to its page on the Hub."""
    return link(repo_id, f"https://huggingface.co/{repo_id}")


def picture(name: str) -> Markdown:
    """Return a figure of bake's own as an image. Raises CheckpointError for any other name."""
    stem = name.removeprefix(f"{FIGURES}/").removesuffix(".png")
    if stem not in ALTERNATIVES or name != f"{FIGURES}/{stem}.png":
        raise CheckpointError(f"bake.json names a figure {name!r}, which bake does not draw")
    return Markdown(f"![{ALTERNATIVES[stem]}]({name})")


def card_environment() -> Environment:
    """Return the Jinja environment that the card's template is written for."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(shipped("model_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # That would be HTML's; `finalize` escapes all that is not Markdown yet.
        finalize=finalize,
    )
    environment.filters |= {
        "cell": cell,
        "code": code,
        "figure": figure,
        "format": format_values,
        "hub_link": hub_link,
        "identifier": identifier,
        "interval": interval,
        "json": partial(json.dumps, sort_keys=True, ensure_ascii=False),
        "literal": literal,
        "picture": picture,
        "request": completion_request,
        "sentence": sentence,
    }
    return environment


def render_card(values: Mapping[str, Any], template: str = CARD_TEMPLATE) -> str:
    """Return the card's Markdown. `values` are the keys of `bake.json`, see the template.

    Texts in it are shown and never obeyed: whatever is no number is escaped. Raises CheckpointError
    where a value is missing or not of its kind, which can only be in a `bake.json` of others.
    """
    from jinja2 import TemplateError

    try:
        # Where a value is missing, the template says which.
        head = compose_front_matter(values) if "base" in values and "auto_class" in values else ""
        told = {
            "front_matter": Markdown(head),
            "licence_lines": card_lines(values.get("licence") or {}),
            "left_out_lines": left_out.card_lines(values.get("left_out", ())),
        }
        return card_environment().get_template(template).render({**values, **told})
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"no card can be written from bake.json, for it is not as bake writes it: {explain(error)}"
        ) from error


def render_record(recorded: Mapping[str, Any]) -> str:
    """Return the card of a `bake.json`, of a push or of an ablation; raises as `render_card`."""
    if is_ablation(recorded):
        return render_card({**recorded, **ablation_words(recorded)}, ABLATION_TEMPLATE)
    return render_card({**recorded, **card_words_of_record(recorded)})


def write_card_files(
    directory: Path, record: Mapping[str, Any], plan: Plan, decision: Decision
) -> None:
    """Write what goes with the weights: the unit vectors, the figures, the card.

    record: the values of `bake.json`, see `bake.pipeline.record.describe_bake`.
    """
    site, metadata = plan.route.site, decision.direction.metadata
    push = decision.push
    pushed = Direction(
        {entry.layer: push.directions[entry.layer] for entry in push.layers}, site, metadata
    )
    (directory / DIRECTION_FILE).write_bytes(direction_bytes(pushed))
    draw_figures(directory, push, site, metadata, decision.evidence)
    card = render_card({**record, **card_words_of_plan(plan, decision.direction, record)})
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def draw_figures(
    directory: Path,
    push: Push,
    site: str,
    metadata: Mapping[str, str],
    evidence: Evidence | None = None,
) -> None:
    """Write `figures/`: the norms with the coefficients, how well the direction separates where its
    metadata knows, and a sweep's where one is given.
    """
    draw_norms(
        directory / FIGURES / "norms.png",
        {entry.layer: entry.activation_norm for entry in push.layers},
        {entry.layer: entry.coefficient for entry in push.layers},
        site,
        push.multiplier,
    )
    separation = parse_separation(metadata)
    if separation is not None:
        accuracy = {entry.layer: (entry.accuracy, *entry.interval) for entry in separation.layers}
        draw_separation(directory / FIGURES / "separation.png", accuracy)
    if evidence is not None:
        evidence.copy_figures(directory)


def card_words(
    site: str,
    slots: str,
    plan: Mapping[str, Any],
    direction: Mapping[str, Any],
    recorded: Mapping[str, Any],
    added_layers: int = 0,
) -> dict[str, Any]:
    """Return the phrases that the card needs beside the values of `bake.json`."""
    known = direction["metadata"]
    summary = f"found at {direction['site']}"
    how = METHOD_WORDS.get(known.get("method", ""))
    if how is not None:
        summary += (
            f" as {how} over {known.get('pairs', '?')} contrast pairs "
            f"(token position: {known.get('token', '?')})"
        )
    if known.get("method") == "sum":
        summary += f": the sum {known['parts']}"
    if "understood" in known:
        summary += f"; read from another tool's file: {known['understood']}"
    return {
        **describe_model(recorded),
        "site_description": DESCRIPTIONS[site],
        "slots": slots,
        "separation": parse_separation(known),
        "orthogonalized": "orthogonalized" in known,
        "added_layers": added_layers,
        "config_changes": plan["config_changes"],
        "config_removed": plan.get("config_removed", []),
        "direction_summary": summary,
    }


def describe_model(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's title, what the model is in words, and the pairs that it shows.

    recorded: "base", "about", "multiplier" and "direction" of `bake.json`. A title that nobody gave has the
    base's name, the concept and m: "SmolLM2-135M-Instruct, more formal (m = 0.5)".
    """
    about, multiplier = recorded.get("about") or {}, float(recorded["multiplier"])
    parts = recorded.get("directions") or ()
    if parts:
        concept = "steered by " + " and ".join(str(part["name"]) for part in parts)
    else:
        concept = describe_concept(about.get("concept"), multiplier)
    base = str(recorded["base"]["id"]).rpartition("/")[2]
    metadata = recorded["direction"]["metadata"]
    return {
        "title": about.get("name") or f"{base}, {concept} (m = {multiplier:g})",
        "concept": concept,
        "description": about.get("description"),
        "pairs": _shown_pairs(metadata),
        "pairs_name": metadata.get("pairs_name"),
        "pairs_sha256": metadata.get("pairs_sha256"),
    }


def _shown_pairs(metadata: Mapping[str, str]) -> list[list[str]]:
    """Return the pairs that a direction's metadata shows; none where it has none to show."""
    if "pairs_shown" not in metadata:
        return []
    try:
        found = parse_json(metadata["pairs_shown"], "pairs_shown", error=CheckpointError, kind=list)
    except CheckpointError:  # Cut, or of others: the card does without.
        return []
    fits = all(isinstance(p, list) and [type(text) for text in p] == [str, str] for p in found)
    return [list(pair) for pair in found[:SHOWN]] if fits else []


def card_words_of_plan(
    plan: Plan, direction: Direction, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the card's phrases for a bake that is being made. record: the values of `bake.json`."""
    route = plan.route
    return card_words(
        route.site,
        route.describe(),
        plan.to_dict(),
        direction.to_dict(),
        record,
        plan.added_layers,
    )


def card_words_of_record(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's phrases, from `bake.json`."""
    return card_words(
        recorded["site"],
        recorded["slot"]["description"],
        recorded["plan"],
        recorded["direction"],
        recorded,
        recorded.get("added_layers", 0),
    )
