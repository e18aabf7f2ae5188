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

from bake.checkpoint.front_matter import read_front_matter
from bake.errors import BakeError
from bake.io.foreign_json import read_bounded
from bake.io.foreign_paths import check_links
from bake.support.markdown import Markdown, code, link
from bake.support.progress import warn
from bake.support.text import one_line

NOTICE_FILE = "NOTICE"
MAX_CARD = 20_000_000  # bytes; cards with pictures or long tables in them stay below 2 MB
MAX_ENTRIES = 200  # languages of one card; a hundred is a lot
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
    nothing. The first three are a list where the card names several. notice: the text of the file NOTICE
    that bake adds, None where the base has such a file or its licences ask for none. Where the card
    cannot be read, which is announced, "unreadable" says why, and the licence is not known.
    """
    try:
        found, unreadable = _read_card(directory), {}
        licence: dict[str, Any] = {
            key: _one_or_all(_texts(key, found.get(key)))
            for key in ("license", "license_name", "license_link")
        }
        licence["language"] = _texts("language", found.get("language"))
    except BakeError as error:
        warn(f"the base's licence is not known, for its card cannot be read: {error}")
        unreadable = {"unreadable": one_line(error)}
        licence = dict.fromkeys(("license", "license_name", "license_link")) | {"language": []}
    has_notice = any(_NOTICE_FILE.match(name) for name in companions)
    notices = dict.fromkeys(duties.notice for _, duties in all_duties(licence))
    notice = "\n".join(notices) if notices and not has_notice else None
    return {**licence, "notice": notice, **unreadable}


def _read_card(directory: Path) -> dict[str, Any]:
    """Return the front matter of a base's card, {} where it has no card; raise BakeError."""
    path, remedy = directory / "README.md", "mend it, or take it out of the base"
    if not path.exists() and not path.is_symlink():
        return {}
    check_links(directory, [path.name])
    try:
        return read_front_matter(read_bounded(path, MAX_CARD, remedy=remedy).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BakeError(f"{path.name} is not UTF-8 text ({error.reason}): {remedy}") from None


def all_duties(licence: Mapping[str, Any]) -> list[tuple[str, Duties]]:
    """Return what each of a licence's names asks for, where it is in the table: [(name, duties)].

    Of several licences each one's duties have to be met, so that the strictest rule holds whichever
    of them is meant. A licence "other" goes by its name.
    """
    names: list[str] = []
    for entry in _entries(licence.get("license")):
        other = _entries(licence.get("license_name")) if entry.lower() == "other" else []
        names += other or [entry]
    known = known_duties()
    return [(name, known[name.lower()]) for name in dict.fromkeys(names) if name.lower() in known]


def write_notice(licence: Mapping[str, Any], directory: Path) -> None:
    """Write the NOTICE that the base lacks and its licence asks for."""
    if licence.get("notice"):
        (directory / NOTICE_FILE).write_text(f"{licence['notice']}\n", encoding="utf-8")


def card_lines(licence: Mapping[str, Any]) -> list[Markdown]:
    """Return the card's paragraphs on the licence."""
    names = _entries(licence.get("license_name")) or _entries(licence.get("license"))
    links = _entries(licence.get("license_link"))
    if licence.get("unreadable"):
        return [
            Markdown(
                "What licence the base model is under could not be read from its card; whatever holds for "
                "it holds here too."
            )
        ]
    if not names:
        return [
            Markdown(
                "The base model names no licence in its card; whatever holds for it holds here too."
            )
        ]
    shown = [
        code(name) if place >= len(links) or "://" not in links[place] else link(name, links[place])
        for place, name in enumerate(names)
    ]
    lines = [
        Markdown("The base model's licence, %s, applies to this model too.") % shown[0]
        if len(shown) == 1
        else Markdown(
            "The base model's licences, %s, apply to this model too; what each of them asks is met."
        )
        % Markdown(", ").join(shown)
    ]
    found = dict.fromkeys(duties for _, duties in all_duties(licence))
    for duties in found:
        if duties.phrase:
            lines.insert(0, Markdown(f"**{duties.phrase}**"))
    for duties in found:  # From bake's own table.
        terms = f" Terms: {duties.terms}." if duties.terms else ""
        lines.append(Markdown(f"{duties.notice.rstrip('.')}.{terms}"))
        if duties.remark:
            lines.append(Markdown(duties.remark))
    if found:
        lines.append(
            Markdown("The weights and `config.json` were modified by bake, as described above.")
        )
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
    if public and licence.get("unreadable"):
        found.append(
            f"the card of {base} cannot be read, so its licence is unknown ({licence['unreadable']})"
        )
    elif public and not licence.get("license"):
        found.append(f"{base} names no licence")
    if public and base_access != "open":
        found.append(f"{base} is {base_access} on the Hub")
    for family, duties in all_duties(licence):
        found += _unmet(family, duties, repo_id, files, card)
    return found


def _unmet(
    family: str, duties: Duties, repo_id: str, files: Collection[str] | None, card: str
) -> list[str]:
    """Return what one licence asks for and a bake does not do."""
    found = []
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


def _entries(value: Any) -> list[str]:
    """Return a recorded field as a list: one text, or several."""
    return [str(entry) for entry in (value if isinstance(value, list) else [value]) if entry]


def _one_or_all(texts: list[str]) -> str | list[str] | None:
    return texts if len(texts) > 1 else texts[0] if texts else None


def _texts(key: str, value: Any) -> list[str]:
    """Return a field of the front matter as texts of one line each; YAML reads Norwegian's code as False.

    Raises BakeError for what is neither a text nor a list of texts.
    """
    entries = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(entry, dict | list) for entry in entries) or len(entries) > MAX_ENTRIES:
        raise BakeError(
            f"{key} in the metadata of README.md is neither a text nor a short list of texts: mend it"
        )
    texts = ["no" if entry is False else one_line(entry) for entry in entries if entry is not None]
    return [text for text in texts if text]
