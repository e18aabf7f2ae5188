"""The YAML at the head of a model card: read of a base's, composed for a bake's, checked before a push.

The Hub finds, files and licenses a model by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bake.errors import BakeError

TAGS = ("steering", "activation-steering", "bake")
RELATION = "finetune"
LICENCE_FIELDS = ("license", "license_name", "license_link", "language")
_BLOCK = re.compile(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_front_matter(card: str) -> dict[str, Any]:
    """Return a card's front matter; {} where it has none. Raises BakeError where it is no mapping."""
    import yaml

    block = _BLOCK.match(card)
    if block is None:
        return {}
    try:
        values = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise BakeError(f"the metadata of README.md is not YAML: {reason}") from None
    if values is not None and not isinstance(values, dict):
        raise BakeError(f"the metadata of README.md is not a mapping but {values!r}"[:200])
    return values or {}


def compose_front_matter(values: Mapping[str, Any]) -> str:
    """Return the YAML of a bake's card, without its fences; `values` are the keys of `bake.json`."""
    import yaml

    licence = values.get("licence") or {}
    multimodal = values["auto_class"] == "AutoModelForImageTextToText"
    found: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if multimodal else "text-generation",
    }
    if values["base"]["revision"]:
        found |= {"base_model": values["base"]["id"], "base_model_relation": RELATION}
    found |= {key: licence.get(key) for key in LICENCE_FIELDS} | {"tags": list(TAGS)}
    known = {key: value for key, value in found.items() if value}
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000))


def check_front_matter(card: str, recorded: Mapping[str, Any]) -> None:
    """Raise BakeError for a card whose metadata the Hub would not take, or take for something else.

    recorded: the bake's `bake.json`.
    """
    found = read_front_matter(card)
    wanted: dict[str, Any] = {"library_name": "transformers"}
    base = recorded.get("base") or {}
    if base.get("revision"):
        wanted |= {"base_model": base["id"], "base_model_relation": RELATION}
    wanted |= {
        key: value
        for key, value in (recorded.get("licence") or {}).items()
        if key in LICENCE_FIELDS and value
    }
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
