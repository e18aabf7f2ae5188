"""What a base's licence asks of a checkpoint derived from it, and whether a bake does it.

Licences do not inherit by themselves: the base's fields go into the bake's card, its LICENSE, NOTICE and
USE_POLICY files are carried as companions, and families whose terms ask for a name, a notice or a
phrase are in `licences.toml`. This is no legal advice: it is what can be checked by a program.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bake.errors import BakeError
from bake.front_matter import read_front_matter

NOTICE_FILE = "NOTICE"
_FACTS = Path(__file__).with_name("licences.toml")
_LICENCE_FILE = re.compile(r"licen[cs]e", re.IGNORECASE)
_NOTICE_FILE = re.compile(r"notice", re.IGNORECASE)


@dataclass(frozen=True)
class Duties:
    """What a family's terms ask; the fields are explained where the facts are, in `licences.toml`."""

    source: str
    notice: str
    agreement: bool
    phrase: str | None = None
    name: str | None = None
    terms: str | None = None
    remark: str | None = None


@cache
def known_duties() -> Mapping[str, Duties]:
    """Return `licences.toml`: {the Hub's licence identifier: what it asks}."""
    facts = tomllib.loads(_FACTS.read_text(encoding="utf-8"))
    return {identifier: Duties(**fields) for identifier, fields in facts.items()}


def read_licence(directory: Path, companions: Collection[str]) -> dict[str, Any]:
    """Return what `bake.json` records of a base's licence, from the front matter of its card.

    {"license", "license_name", "license_link", "language", "notice"}; None or [] where the card says
    nothing. notice: the text of the file NOTICE that bake adds, None where the base has such a file
    or its licence asks for none.
    """
    try:
        found = read_front_matter((directory / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, BakeError):
        found = {}  # A base whose card cannot be read names no licence, and publishing says so.
    licence = {
        "license": _first(found.get("license")),
        "license_name": _first(found.get("license_name")),
        "license_link": _first(found.get("license_link")),
        "language": _texts(found.get("language")),
    }
    duties = duties_of(licence)
    needed = duties is not None and not any(_NOTICE_FILE.match(name) for name in companions)
    return {**licence, "notice": duties.notice if duties and needed else None}


def duties_of(licence: Mapping[str, Any]) -> Duties | None:
    """Return what a licence asks for, where it is in the table; a licence "other" goes by its name."""
    identifier = str(licence.get("license") or "").lower()
    if identifier == "other":
        identifier = str(licence.get("license_name") or "").lower()
    return known_duties().get(identifier)


def write_notice(licence: Mapping[str, Any], directory: Path) -> None:
    """Write the NOTICE that the base lacks and its licence asks for."""
    if licence.get("notice"):
        (directory / NOTICE_FILE).write_text(licence["notice"] + "\n", encoding="utf-8")


def card_lines(licence: Mapping[str, Any]) -> list[str]:
    """Return the card's paragraphs on the licence."""
    name = licence.get("license_name") or licence.get("license")
    link = licence.get("license_link")
    if not name:
        return [
            "The base model names no licence in its card; whatever holds for it holds here too."
        ]
    shown = f"[{name}]({link})" if link and "://" in str(link) else f"`{name}`"
    lines = [f"The base model's licence, {shown}, applies to this model too."]
    duties = duties_of(licence)
    if duties is None:
        return lines
    if duties.phrase:
        lines.insert(0, f"**{duties.phrase}**")
    terms = f" Terms: {duties.terms}." if duties.terms else ""
    lines.append(f"{duties.notice.rstrip('.')}.{terms}")
    if duties.remark:
        lines.append(duties.remark)
    lines.append("The weights and `config.json` were modified by bake, as described above.")
    return lines


def find_objections(
    licence: Mapping[str, Any],
    repo_id: str,
    *,
    public: bool,
    base: str = "the base",
    base_access: str = "open",
    files: Collection[str] | None = None,
    card: str = "",
) -> list[str]:
    """Return why a bake should not be published as `repo_id`, each in a phrase; empty where it may.

    base_access: "open", "gated" or "hidden", as the Hub says of the base. files: the names of
    those that go along; None before they are written, when only the name and the right to publish are
    asked.
    """
    found = []
    if public and not licence.get("license"):
        found.append(f"{base} names no licence")
    if public and base_access != "open":
        found.append(f"{base} is {base_access} on the Hub")
    duties = duties_of(licence)
    if duties is None:
        return found
    family = licence.get("license_name") or licence["license"]
    name = repo_id.split("/")[-1]
    if duties.name and not _plain(name).startswith(_plain(duties.name)):
        found.append(f"{family} asks for a name that begins with {duties.name}, and this is {name}")
    if files is None:
        return found
    if duties.phrase and duties.phrase not in card:
        found.append(f'{family} asks for "{duties.phrase}" in the card')
    if not any(_NOTICE_FILE.match(file) for file in files):
        found.append(f'{family} asks for a file {NOTICE_FILE} that says "{duties.notice}"')
    if duties.agreement and not any(_LICENCE_FILE.match(file) for file in files):
        found.append(
            f"{family} asks for a copy of the licence, and the base has no file LICENSE: put one into a "
            f"copy of the base and export from there"
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _first(value: Any) -> str | None:
    texts = _texts(value)
    return texts[0] if texts else None


def _texts(value: Any) -> list[str]:
    """A field as a list of texts; YAML reads Norwegian's code as False."""
    entries = value if isinstance(value, list) else [] if value is None else [value]
    return ["no" if entry is False else str(entry) for entry in entries]
