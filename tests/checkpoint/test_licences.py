"""What licences ask: read from a base's card, met in the bake's files, or refused before it is sent."""

import json
import re

import pytest
import yaml
from card_values import CARD_VALUES
from publishing import FILES, REPO_ID, refusal, write_output

from bake.card.render import render_card
from bake.checkpoint.front_matter import (
    TAGS,
    check_front_matter,
    compose_front_matter,
    read_front_matter,
)
from bake.checkpoint.licences import (
    card_lines,
    find_objections,
    known_duties,
    read_licence,
    write_notice,
)
from bake.errors import BakeError
from bake.hub import check_rights, publish

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

SHA = "0123456789" * 4


def licence_of(tmp_path, card, companions=()):
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    return read_licence(tmp_path, companions)


def bake_of(licence, revision=SHA):
    """What a card's front matter is composed from."""
    base = {"id": "acme/base", "revision": revision}
    return {"auto_class": "AutoModelForCausalLM", "base": base, "licence": licence}


LLAMA = {"license": "llama3.2", "license_name": None, "license_link": None, "language": ["en"]}


def test_fields_are_read_as_people_write_them(tmp_path):
    found = licence_of(
        tmp_path,
        "---\nlicense: other\nlicense_name: llama4\nlicense_link: LICENSE\nlanguage:\n- en\n- no\n---\n#",
    )
    assert found["license"] == "other"
    assert found["license_name"] == "llama4"
    assert found["language"] == ["en", "no"]  # YAML takes Norwegian's code for False
    assert found["notice"].startswith("Llama 4 is licensed under")
    assert licence_of(tmp_path, "---\nlicense: mit\nlanguage: en\n---\n")["language"] == ["en"]
    for silent in ("# No front matter\n", "---\n[a\n---\n", "---\n- a\n---\n", "---\n---\n"):
        assert licence_of(tmp_path, silent)["license"] is None
    assert read_licence(tmp_path / "nowhere", ())["license"] is None


def test_a_notice_of_the_bases_own_is_not_written_over(tmp_path):
    card = "---\nlicense: gemma\n---\n"
    assert licence_of(tmp_path, card, ("Notice.txt", "LICENSE"))["notice"] is None
    licence = licence_of(tmp_path, card, ("LICENSE",))
    write_notice(licence, tmp_path)
    assert "ai.google.dev/gemma/terms" in (tmp_path / "NOTICE").read_text()


def test_front_matter_carries_the_base_and_its_licence():
    found = read_front_matter(f"---\n{compose_front_matter(bake_of(LLAMA))}---\n# x\n")
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "acme/base",
        "base_model_relation": "finetune",
        "license": "llama3.2",
        "language": ["en"],
        "tags": ["steering", "activation-steering", "bake"],
    }
    assert "base_model" not in compose_front_matter(bake_of(LLAMA, revision=None))
    norwegian = compose_front_matter(bake_of({**LLAMA, "language": ["no"]}))
    assert yaml.safe_load(norwegian)["language"] == ["no"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("base_model: acme/base", "base_model: else/where", "base_model 'else/where'"),
        ("base_model_relation: finetune", "base_model_relation: adapter", "'adapter'"),
        ("license: llama3.2", "license: mit", "license 'mit', not 'llama3.2'"),
        ("library_name: transformers\n", "", "library_name None"),
        ("pipeline_tag: text-generation\n", "", "pipeline_tag"),
        ("- bake\n", "", "lacks the tags"),
        ("license: llama3.2", "license: [", "is not YAML"),
    ],
)
def test_metadata_that_is_not_the_bakes_is_refused(old, new, says):
    card = f"---\n{compose_front_matter(bake_of(LLAMA))}---\n# x\n"
    check_front_matter(card, bake_of(LLAMA))
    assert old in card
    with pytest.raises(BakeError, match=re.escape(says)):
        check_front_matter(card.replace(old, new), bake_of(LLAMA))


def test_a_base_id_that_is_none_is_refused():
    recorded = bake_of(LLAMA)
    recorded["base"]["id"] = "not an id"
    card = f"---\n{compose_front_matter(recorded)}---\n# x\n"
    with pytest.raises(BakeError, match="no Hub id"):
        check_front_matter(card, recorded)


def test_every_familys_card_says_what_its_terms_ask():
    for identifier, duties in known_duties().items():
        text = "\n".join(card_lines({"license": identifier}))
        assert duties.notice.rstrip(".") in text
        assert (duties.phrase or "") in text
        assert (duties.remark or "") in text
        assert "modified by bake" in text
    assert "Built with" not in "\n".join(card_lines({"license": "mit"}))
    assert "names no licence" in card_lines({})[0]


def test_the_notices_are_those_of_the_licences():
    """Word for word from their sections 1.b.iii (Llama) and 3.1.d (Gemma)."""
    meta = "Copyright © Meta Platforms, Inc. All Rights Reserved."
    found = known_duties()
    for version in ("3.1", "3.2", "3.3", "4"):
        duties = found[f"llama{version}"]
        own = f"Llama {version} is licensed under the Llama {version} Community License, {meta}"
        assert (duties.notice, duties.name) == (own, "Llama")
    assert found["llama3"].name == "Llama 3"
    assert found["llama3"].phrase == "Built with Meta Llama 3"
    assert found["llama2"].name is found["llama2"].phrase is None
    assert "section 3.2" in found["gemma"].remark
    assert all(duties.agreement or duties.terms for duties in found.values())


@pytest.mark.parametrize(
    ("identifier", "name", "files", "card", "missing"),
    [
        ("llama3.2", "Llama-3.2-1B-kind", ["LICENSE.txt", "NOTICE"], "Built with Llama", []),
        ("llama3.2", "kind-Llama", ["LICENSE.txt", "NOTICE"], "Built with Llama", ["begins with"]),
        (
            "llama3",
            "Llama-2-kind",
            ["LICENSE", "NOTICE"],
            "Built with Meta Llama 3",
            ["begins with"],
        ),
        ("llama3", "Llama-3-kind", ["LICENSE", "NOTICE"], "Built with Meta Llama 3", []),
        ("llama3.1", "Llama-kind", ["LICENSE"], "Built with Llama", ["a file NOTICE"]),
        (
            "llama3.1",
            "Llama-kind",
            ["NOTICE"],
            "Built with Llama",
            ["the base has no file LICENSE"],
        ),
        ("llama3.1", "Llama-kind", ["NOTICE", "LICENSE"], "", ['"Built with Llama" in the card']),
        ("gemma", "kind", ["NOTICE"], "", []),
        ("gemma", "kind", [], "", ["a file NOTICE"]),
        ("llama3.3", "kind", [], "", ["begins with", "in the card", "NOTICE", "LICENSE"]),
        ("apache-2.0", "kind", [], "", []),
    ],
)
def test_what_is_missing_is_named(identifier, name, files, card, missing):
    found = find_objections(
        {"license": identifier}, f"ada/{name}", public=False, files=files, card=card
    )
    assert len(found) == len(missing)
    assert all(part in phrase for part, phrase in zip(missing, found, strict=True))


def test_before_there_are_files_only_name_and_right_are_asked():
    found = find_objections({"license": "llama3.1"}, "ada/kind", public=True, base_access="gated")
    assert len(found) == 2
    assert not find_objections({"license": "llama3.1"}, "ada/Llama-kind", public=True)


def changed_bake(tmp_path, licence, base=None):
    """A small baked directory of a base with another licence."""
    head = compose_front_matter({**bake_of(licence), "base": base or {"revision": None}})
    files = {**FILES, "README.md": f"---\n{head}---\n# A steered model\n".encode()}
    values = {"licence": licence} | ({"base": base} if base else {})
    return write_output(tmp_path / "changed", files, **values)


def test_a_public_push_without_a_licence_is_refused_before_anything_is_sent(hub, tmp_path):
    output = changed_bake(tmp_path, {})
    message = refusal(publish, output, REPO_ID, private=False)
    assert "names no licence" in message
    assert "--accept-licence" in message
    assert REPO_ID not in hub.repos
    publish(output, "ada/hidden")  # Private it may be.
    publish(output, REPO_ID, private=False, accept_licence=True)
    assert hub.repos[REPO_ID].private is False


@pytest.mark.parametrize("access", ["gated", "hidden", "gone"])
def test_a_public_push_from_a_base_that_is_not_open_is_refused(hub, tmp_path, access):
    if access != "gone":
        hub.create_repo("acme/base", gated=access == "gated", private=access == "hidden")
    base = {"id": "acme/base", "revision": SHA}
    output = changed_bake(tmp_path, {"license": "mit"}, base)
    says = "acme/base is gated" if access == "gated" else "acme/base is hidden"
    assert says in refusal(publish, output, REPO_ID, private=False)
    assert REPO_ID not in hub.repos
    assert says in refusal(
        check_rights, json.loads((output / "bake.json").read_text()), REPO_ID, public=True
    )
    publish(output, REPO_ID, private=False, accept_licence=True)
    assert hub.repos[REPO_ID].private is False


def test_a_name_that_the_licence_does_not_allow_is_refused_privately_too(hub, tmp_path):
    output = changed_bake(tmp_path, LLAMA)
    message = refusal(publish, output, REPO_ID)
    assert "a name that begins with Llama, and this is steered" in message
    assert "NOTICE" in message
    assert REPO_ID not in hub.repos
    assert hub.received_lfs_bytes == 0


def test_metadata_is_checked_before_anything_is_asked(hub, tmp_path):
    files = {**FILES, "README.md": b"---\nlicense: [\n---\n"}
    assert "is not YAML" in refusal(publish, write_output(tmp_path / "bad", files), REPO_ID)
    assert hub.requests == []
    assert set(TAGS) == {"steering", "activation-steering", "bake"}


def test_a_card_of_a_llama_says_so(tmp_path):
    card = render_card({**CARD_VALUES, "licence": LLAMA})
    assert "**Built with Llama**" in card
    assert read_front_matter(card)["license"] == "llama3.2"
    check_front_matter(card, {**CARD_VALUES, "licence": LLAMA})
    assert "Built with" not in render_card({**CARD_VALUES, "licence": {"license": "mit"}})
