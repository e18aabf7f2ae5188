"""The shipped sets: complete, clean, described, and found by name from every command."""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from itertools import combinations, product
from pathlib import Path

import pytest

from bake import report
from bake.cli.main import main
from bake.directions.fit import read_pairs
from bake.errors import PromptError
from bake.io.shipped import DEMO_MODEL, shipped, shipped_sets
from bake.texts import shipped as prompt_sets
from bake.texts.prompts import read_prompts
from bake.texts.rows import read_rows

CALIBRATION = shipped("calibration")
PROMPTS = sorted(shipped_sets("prompts"))
PAIRS = sorted(shipped_sets("pairs"))
WORDS = sorted(shipped_sets("words"))
AXES = [name for name in PAIRS if not name.endswith(".held-out")]
# The demo model knows few words, so its pairs resemble each other; test_demo_model.py checks them.
EVERYDAY = [name for name in PAIRS if not re.fullmatch(r"toy-cheerful-gloomy(\.held-out)?", name)]
NEAR = 0.6  # the share of words in common from which two texts count as one said twice


@pytest.fixture
def run(capsys):
    """Return a function (arguments) → (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def overlap(one: str, other: str) -> float:
    return len(words(one) & words(other)) / len(words(one) | words(other))


def nearly_twice(texts: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in combinations(texts, 2) if overlap(a, b) > NEAR]


def test_a_near_duplicate_is_noticed():
    one = "The bus to the harbour leaves at nine."
    assert nearly_twice([one, "The bus to the harbour leaves at ten.", "Soup is made of leeks."])
    assert not nearly_twice([one, "Soup is made of leeks."])


def test_the_sets_that_were_promised_are_there():
    assert {"neutral", "chat", "code", "multilingual"} <= set(PROMPTS)
    for axis in (
        "toy-cheerful-gloomy",
        "cheerful-gloomy",
        "formal-casual",
        "concise-wordy",
        "confident-hedging",
        "first-third-person",
    ):
        assert len(read_pairs(axis)) >= 60
        assert len(read_pairs(f"{axis}.held-out")) >= 20
    assert not set(PROMPTS) & set(PAIRS)


@pytest.mark.parametrize("name", ["neutral", "chat", "code", "multilingual"])
def test_prompts_are_many_and_different(name):
    texts = read_prompts(name)
    assert len(texts) >= 64
    assert not nearly_twice(texts)


def test_chat_requests_have_a_request_s_length():
    assert all(8 <= len(text.split()) <= 60 for text in read_prompts("chat"))


def test_languages_and_scripts_are_many():
    rows = [row for _, row in read_rows(CALIBRATION / "prompts" / "multilingual.jsonl")]
    letters = {letter for row in rows for letter in row["text"] if letter.isalpha()}
    scripts = {unicodedata.name(letter).split()[0] for letter in letters}
    assert len({row["language"] for row in rows}) >= 16
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI"} <= scripts
    assert {"CJK", "HIRAGANA", "HANGUL", "THAI", "TAMIL"} <= scripts


def test_programming_languages_are_many():
    rows = [row for _, row in read_rows(CALIBRATION / "prompts" / "code.jsonl")]
    assert len({row["language"] for row in rows}) >= 16


@pytest.mark.parametrize("path", sorted(CALIBRATION.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_files_are_clean_utf_8_with_one_object_a_line(path):
    content = path.read_bytes().decode("utf-8")
    assert content.endswith("\n")
    assert "\r" not in content
    texts = [value for _, row in read_rows(path) for value in row.values()]
    allowed = "\n\t" if path.stem == "code" else ""
    for text in texts:
        assert unicodedata.normalize("NFC", text) == text
        assert "�" not in text
        assert not [c for c in text if unicodedata.category(c) == "Cc" and c not in allowed]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_differ_only_after_their_prompt_and_end_alike(name):
    pairs = read_pairs(name)
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    texts = [pair.prompt + text for pair in pairs for text in (pair.positive, pair.negative)]
    assert len(set(texts)) == len(texts)
    for pair in pairs:
        assert pair.prompt == pair.prompt.strip()
        for text in (pair.positive, pair.negative):
            assert text == " " + text.strip()
        assert pair.positive[-1] == pair.negative[-1]
        assert pair.positive[-1] in '.?!"'


@pytest.mark.parametrize("name", EVERYDAY)
def test_pairs_do_not_repeat_each_other(name):
    pairs = read_pairs(name)
    for side in ("positive", "negative"):
        assert not nearly_twice([pair.prompt + getattr(pair, side) for pair in pairs])


@pytest.mark.parametrize("name", EVERYDAY)
def test_the_two_texts_have_the_axis_s_lengths(name):
    lengths = [
        (len(pair.positive.split()), len(pair.negative.split())) for pair in read_pairs(name)
    ]
    ratio = sum(negative for _, negative in lengths) / sum(positive for positive, _ in lengths)
    if name.startswith("concise-wordy"):
        assert all(negative > 3 * positive for positive, negative in lengths)
    else:
        assert 0.85 < ratio < 1.15
        assert all(0.5 < negative / positive < 2 for positive, negative in lengths)


# Not first-third-person, where pronouns are the axis, nor concise-wordy, whose long texts share words
# that the short ones have no room for.
@pytest.mark.parametrize("name", ["formal-casual", "confident-hedging", "cheerful-gloomy"])
def test_no_single_word_carries_the_axis(name):
    """A direction should not be the direction of one word: none is in most of one side only."""
    pairs = read_pairs(name)
    positive = [words(pair.positive) for pair in pairs]
    negative = [words(pair.negative) for pair in pairs]
    for word in set().union(*positive, *negative):
        only = sum(word in a for a in positive) - sum(word in b for b in negative)
        assert abs(only) < len(pairs) / 3, word


@pytest.mark.parametrize("name", AXES)
def test_held_out_pairs_are_new(name):
    training, held_out = read_pairs(name), read_pairs(f"{name}.held-out")
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    if name in EVERYDAY:
        for one, other in product(training, held_out):
            assert overlap(one.prompt + one.positive, other.prompt + other.positive) <= NEAR
            assert overlap(one.prompt + one.negative, other.prompt + other.negative) <= NEAR


def test_the_readme_names_every_file_and_its_lines():
    readme = (CALIBRATION / "README.md").read_text(encoding="utf-8")
    for path in CALIBRATION.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert f"`{path.relative_to(CALIBRATION).as_posix()}`" in readme
    for found in (each for each in prompt_sets.list_sets() if each.kind != "words"):
        assert f"| `{found.kind}/{found.name}.jsonl` | {found.count} |" in readme


def test_every_set_is_described_once_and_in_one_line():
    described = json.loads((CALIBRATION / "descriptions.json").read_text(encoding="utf-8"))
    assert sorted(described["prompts"]) == PROMPTS
    assert sorted(described["pairs"]) == PAIRS
    for found in prompt_sets.list_sets():
        assert 0 < len(found.description) <= 70
        assert "\n" not in found.description


def test_the_wheel_takes_the_whole_folder():
    project = Path(__file__).parents[2] / "pyproject.toml"
    wheel = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert wheel["wheel"]["force-include"]["calibration"] == "bake/calibration"
    assert (project.parent / "calibration").samefile(CALIBRATION)


def test_list_is_a_table_of_every_set(run):
    code, out, _ = run("prompts", "list")
    assert code == 0
    header, *lines = out.splitlines()
    assert header.split()[:3] == ["name", "kind", "count"]
    assert [line.split()[0] for line in lines] == PROMPTS + PAIRS + WORDS
    assert any(re.match(r"formal-casual +pairs +64  the same message", line) for line in lines)


@pytest.mark.parametrize("arguments", [("list", "--json"), ("--json", "list")])
def test_list_as_json(run, arguments):
    if arguments[0] == "--json":
        code, out, _ = run("prompts", "--json", "list")
    else:
        code, out, _ = run("prompts", *arguments)
    assert code == 0
    sets = json.loads(out)["sets"]
    assert {"name", "kind", "count", "description"} == set(sets[0])
    assert len(sets) == len(PROMPTS) + len(PAIRS) + len(WORDS)


def test_show_prints_one_line_a_prompt(run):
    code, out, _ = run("prompts", "show", "chat")
    assert code == 0
    assert out.splitlines() == read_prompts("chat")
    assert run("prompts", "show", "chat", "--limit", 3)[1].splitlines() == read_prompts("chat")[:3]


def test_show_keeps_the_lines_of_code_apart(run):
    first, second = read_prompts("code")[:2]
    assert "\n" in first
    assert run("prompts", "show", "code", "--limit", 2)[1] == f"{first}\n\n{second}\n"


def test_show_prints_two_lines_a_pair(run):
    pair = read_pairs("formal-casual")[0]
    code, out, _ = run("prompts", "show", "formal-casual", "--limit", 1)
    assert code == 0
    assert out.splitlines() == [
        f"+ {pair.prompt}{pair.positive}",
        f"- {pair.prompt}{pair.negative}",
    ]


def test_show_as_json(run):
    shown = json.loads(run("prompts", "show", "formal-casual", "--limit", 2, "--json")[1])
    assert shown["kind"] == "pairs"
    assert shown["count"] == 64
    assert [set(entry) for entry in shown["entries"]] == [{"positive", "negative"}] * 2
    texts = json.loads(run("prompts", "show", "multilingual", "--json")[1])["entries"]
    assert texts == read_prompts("multilingual")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("no-such-set",), "cheerful-gloomy"), (("chat", "--limit", 0), "from 1")],
)
def test_bad_requests_get_one_line(run, arguments, expected):
    code, out, error = run("prompts", "show", *arguments)
    assert (code, out) == (1, "")
    assert len(error.splitlines()) == 1
    assert expected in error


def test_an_unknown_set_names_prompts_and_pairs():
    with pytest.raises(PromptError, match=r"chat, code, .*formal-casual"):
        prompt_sets.show_set("no-such-set")


def test_a_file_of_the_same_name_does_not_hide_the_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").write_text("Mine.\n", encoding="utf-8")
    assert read_prompts("chat") == ["Mine."]  # where a file may be given, a file wins
    assert prompt_sets.show_set("chat").about.count >= 64
    assert "Mine." not in report.describe_set(prompt_sets.show_set("chat"))


def test_names_work_where_files_do(run, tmp_path):
    direction, norms = tmp_path / "direction.safetensors", tmp_path / "norms.json"
    code, out, _ = run("direction", DEMO_MODEL, "--pairs", "first-third-person", "-o", direction)
    assert code == 0
    assert "over 64 pairs" in out
    assert direction.is_file()
    assert run("calibrate", DEMO_MODEL, "--prompts", "multilingual", "-o", norms)[0] == 0
    assert norms.is_file()
    code, _, error = run("direction", DEMO_MODEL, "--pairs", "casual-formal", "-o", direction)
    assert code == 1
    assert "formal-casual" in error
