"""The YAML at the head of a model card: read of a base's, composed for a bake's, checked before a push.

The Hub finds, files and licenses a model by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bake.errors import BakeError
from bake.io.concepts import describe_concept, slug_of
from bake.io.foreign_yaml import load_yaml
from bake.support.text import one_line

TAGS = ("steering", "activation-steering", "bake")
RELATION = "finetune"
LICENCE_FIELDS = ("license", "license_name", "license_link", "language")
_BLOCK = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_front_matter(card: str) -> dict[str, Any]:
    """Return a card's front matter; {} where it has none.

    Raises BakeError where it is no mapping, or not such YAML as `foreign_yaml` reads: a stranger's card
    goes through no reader without bounds, which huggingface_hub's `metadata_load` is.
    """
    block = _BLOCK.match(card)
    if block is None:
        return {}
    values = load_yaml(block[1], "the metadata of README.md", error=BakeError, kind=None)
    if values is not None and not isinstance(values, dict):
        raise BakeError(f"the metadata of README.md is not a mapping but {one_line(values)!r}")
    return values or {}


def compose_front_matter(values: Mapping[str, Any]) -> str:
    """Return the YAML of a bake's card, without its fences; `values` are the keys of `bake.json`."""
    from huggingface_hub import ModelCardData

    multimodal = values["auto_class"] == "AutoModelForImageTextToText"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if multimodal else "text-generation",
        tags=[*TAGS, *_concept_tags(values)],
        **_carried(values),
    )
    return f"{data.to_yaml()}\n"


def _carried(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that come from the base, texts on one line: who it is, its licence, languages."""
    base, licence = recorded.get("base") or {}, recorded.get("licence") or {}
    found: dict[str, Any] = {}
    if base.get("revision") or base.get("claimed"):
        found |= {"base_model": one_line(base["id"]), "base_model_relation": RELATION}
    for key in LICENCE_FIELDS:
        value = licence.get(key)
        if value:
            entries = [one_line(entry) for entry in value] if isinstance(value, list) else None
            found[key] = one_line(value) if entries is None else entries
    return found


def _concept_tags(values: Mapping[str, Any]) -> list[str]:
    """Return the tag of what the model was steered towards, if that is known; of an ablation its kind."""
    name = (values.get("about") or {}).get("concept")
    if "ablation" in values:
        return ["ablation"]
    if not name:
        return []
    return [slug_of(describe_concept(str(name), float(values["multiplier"])))]


def check_front_matter(card: str, recorded: Mapping[str, Any]) -> None:
    """Raise BakeError for a card whose metadata the Hub would not take, or take for something else.

    recorded: the bake's `bake.json`.
    """
    found = read_front_matter(card)
    wanted = {"library_name": "transformers", **_carried(recorded)}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise BakeError(
                f"the metadata of README.md has {key} {found.get(key)!r}, not {value!r}"
            )
    named = found.get("base_model")
    if named is not None and not (isinstance(named, str) and _ID.fullmatch(named)):
        raise BakeError(
            f"the metadata of README.md names {named!r} as base_model, which is no Hub id"
        )
    if not isinstance(found.get("pipeline_tag"), str):
        raise BakeError("the metadata of README.md has no pipeline_tag")
    tags = found.get("tags")
    if not isinstance(tags, list) or not set(TAGS) <= {str(tag) for tag in tags}:
        raise BakeError(f"the metadata of README.md lacks the tags {', '.join(TAGS)}")
