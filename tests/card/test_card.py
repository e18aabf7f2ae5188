"""The card: everything in it comes from values, and a value that is missing is an error."""

import copy
import json
import os
import subprocess

import pytest
import yaml
from card_values import CARD_VALUES
from jinja2 import meta

from bake.card.render import CARD_TEMPLATE, card_environment, describe_model, render_card
from bake.errors import CheckpointError
from bake.io.shipped import shipped

EQUIVALENCE_KEYS = sorted(
    CARD_VALUES["equivalence"].keys() - {"cost", "samples"}
)  # Older bakes have none.
OPTIONAL = {"multiplier_choice", "sweep"}
TOP_KEYS = sorted(
    CARD_VALUES.keys() - {"version", "architecture", "route", "equivalence"} - OPTIONAL
)


def values(**changes):
    return {**copy.deepcopy(CARD_VALUES), **changes}


def equivalence(**changes):
    return values(equivalence={**CARD_VALUES["equivalence"], **changes})


def rows(card, heading):
    """The cells of the table that starts with `heading`, without its two header lines."""
    lines = card.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_coefficient_table_has_one_row_a_layer():
    table = rows(render_card(values()), "| layer |")
    assert table == [
        ["2", "8", "+1.5", "+18.8 %"],
        ["3", "16", "-3", "-18.8 %"],
        ["4", "1.235e+04", "+0.001235", "+0.0 %"],
    ]


def test_proof_table_has_found_and_bound():
    table = {row[0]: row[1:] for row in rows(render_card(values()), "| check |")}
    assert table["mechanism: exact slots, float32"] == ["3.1e-07", "1e-04"]
    assert table["as stored (bfloat16)"] == ["1.3e-03", "5e-03"]
    assert table["representation of the push"] == ["0.17 %", ""]
    assert table["same most likely token"] == ["98.7 %", ""]
    assert table["loads without missing or unexpected keys"] == ["yes", "yes"]


def test_why_this_multiplier_is_said_where_a_sweep_chose_it():
    card = render_card(values())
    assert "m = 1.5 is the largest shift on 24 held-out pairs within the bounds." in card
    table = rows(card, "| m | shift, nats a token |")
    assert table == [["1.5", "+0.640", "1.32", "0.350"], ["2", "–", "–", "–"]]
    given = values()
    del given["multiplier_choice"]
    assert "short sweep" not in render_card(given)


def test_what_a_sweep_showed_is_told_with_its_controls():
    card = render_card(values())
    assert rows(card, "| m | shift |") == [
        ["**1.5**", "+0.640 [+0.600, +0.700]", "95 %", "× 3.7", "× 1.32", "× 1.050", "× 0.7", "× 1.9",
         "0.350", "1.2 %"],
        ["3", *["–"] * 9],
    ]  # fmt: skip
    assert "- Positive window: up to m = +1.5 (m = +3: too much)." in card
    assert "- No negative m is within the bounds: m = -1: too much." in card
    assert "- Chance: at m = 1 it shifts 4.1 × the largest of 8." in card
    assert 'the base, told "Be kind." before every text, shifts +0.200 [+0.100, +0.300].' in card
    assert "- At equal shift, sampled text's perplexity is a × 1.1, b × 1.2" in card
    assert "2 sampled continuations (temperature 1, 40 tokens) of each of 48 openings" in card
    assert "KL over the multiplier, with the window](figures/dose-response.png)" in card
    uncounted = values()
    uncounted["sweep"]["counts_words"] = False
    assert len(rows(render_card(uncounted), "| m | shift |")[0]) == 9
    assert '| "The day" | " was \\| grey" | " was bright" |' in card


def test_limits_say_what_was_not_measured():
    assert "not on knowledge, reasoning, code" in render_card(values())
    without = values()
    del without["sweep"]
    card = render_card(without)
    assert "How strong" not in card
    assert (
        "equivalence with the hooked model, the cost on neutral text and a few samples. Not" in card
    )
    for text in (card, render_card(values())):
        assert "cannot be switched or scaled per request" in text
        assert "figures/norms.png" in text


def test_accepted_rounding_is_said():
    assert "exceeded, accepted" not in render_card(values())
    card = render_card(equivalence(relative_error=0.02))
    assert "| 2.0e-02 | 5e-03 (exceeded, accepted) |" in card


def test_front_matter_names_the_base():
    found = front_matter(render_card(values()))
    assert found["base_model"] == "org/base"
    assert found["library_name"] == "transformers"
    assert "steering" in found["tags"]


def test_local_base_is_no_link_on_the_hub():
    card = render_card(values(base={"id": "my-model", "revision": None}))
    assert "base_model" not in front_matter(card)
    assert "This is my-model, **more formal**" in card


def test_a_local_base_that_the_user_named_is():
    base = {"id": "org/base", "revision": None, "claimed": True}
    assert front_matter(render_card(values(base=base)))["base_model"] == "org/base"


def test_the_reader_comes_first_and_the_machinery_is_folded():
    card = render_card(values())
    order = [
        "# base, more formal (m = 1.5)",
        "from_pretrained(",
        "## What it writes",
        "## What it was steered by",
        "## What it costs",
        "## Limits",
        "## Licence",
        "<summary>How it was made",
        "| layer |",
        "<summary>The proof",
        "| check |",
    ]
    places = [card.index(text) for text in order]
    assert places == sorted(places)
    assert card.count("<details>") == card.count("</details>") == 2


def test_the_code_loads_this_directory_until_it_is_published_and_the_id_and_branch_then():
    assert '.from_pretrained(".")' in render_card(values())
    card = render_card(values(repo_id="you/steered", revision="m0.5"))
    assert '.from_pretrained("you/steered", revision="m0.5")' in card
    assert '.from_pretrained(".")' not in card
    assert "bake verify you/steered --endpoint" in card


def test_pairs_are_shown_with_their_name_and_hash():
    card = render_card(values())
    assert f"from `formal-casual` (SHA-256 of the pairs `{'ab' * 32}`)" in card
    assert '| "Good evening, madam." | "hey \\| there" |' in card
    assert "What it was steered by" not in render_card(values(pairs=[]))


@pytest.mark.parametrize("shown", ['[["a"', "3", '["a"]', '[["a", 3]]'])
def test_pairs_that_a_stranger_wrote_otherwise_are_not_shown(shown):
    values = {
        "base": {"id": "b"},
        "multiplier": 1,
        "direction": {"metadata": {"pairs_shown": shown}},
    }
    assert describe_model(values)["pairs"] == []
    values["direction"]["metadata"]["pairs_shown"] = '[["a", "b"]]'
    assert describe_model(values)["pairs"] == [["a", "b"]]


def test_a_description_comes_before_everything_else_and_is_escaped():
    card = render_card(values(description="# For <b>letters</b>"))
    assert card.index("\\# For &lt;b>letters&lt;/b>") < card.index("This is ")


@pytest.mark.parametrize(
    ("recorded", "title"),
    [
        ({"about": {"concept": "formal-casual"}, "multiplier": 0.5}, "base, more formal (m = 0.5)"),
        ({"about": {"concept": "formal-casual"}, "multiplier": -2}, "base, more casual (m = -2)"),
        (
            {"about": {"concept": "warm-cold"}, "multiplier": 1},
            "base, steered by warm-cold (m = 1)",
        ),
        ({"about": {"concept": "direction"}, "multiplier": 1}, "base, steered (m = 1)"),
        ({"about": {"name": "My model", "concept": "x"}, "multiplier": 1}, "My model"),
        (
            {"multiplier": 1, "directions": [{"name": "a"}, {"name": "b"}]},
            "base, steered by a and b (m = 1)",
        ),
    ],
)
def test_the_title_says_what_the_model_is(recorded, title):
    values = {"base": {"id": "org/base"}, "direction": {"metadata": {}}, **recorded}
    assert describe_model(values)["title"] == title


def test_the_tags_have_the_concept():
    about = {"concept": "formal-casual"}
    assert "formal" in front_matter(render_card(values(about=about)))["tags"]
    assert "casual" in front_matter(render_card(values(about=about, multiplier=-1.0)))["tags"]


def test_card_says_what_was_done():
    card = render_card(values())
    assert "from 2 to 4 (of 6, counted from 0)" in card
    assert "multiplier m = 1.5: α_l = m·μ_l/√d" in card
    assert "`mlp_bias: true`" in card
    assert "found at mlp_out as the difference of means over 4 contrast pairs." in card
    assert "Note: bfloat16 holds the push to 3.0% only." in card


def test_formula_is_only_given_where_it_was_used():
    assert "μ_l/√d" not in render_card(values(law="flat"))


def test_unchanged_config_is_said():
    assert "`config.json` is unchanged" in render_card(values(config_changes={}))
    assert "`config.json` is unchanged" not in render_card(values())


def test_every_engine_is_a_row_with_its_verdict_and_how_it_is_known():
    assert rows(render_card(values()), "| engine |") == [
        ["vLLM 0.33.0", "kept", "reads mlp.down_proj.bias", "read: llama.py"],
        [
            "SGLang 0.5.23",
            "dropped",
            "no slot for mlp.down_proj.bias, ignored without a warning",
            "read: llama.py",
        ],
    ]


@pytest.mark.parametrize("prompt", ["The day", 'It\'s a "day" at 5 $ & <more>', "one\ntwo", "über"])
def test_canarys_command_can_be_copied_into_a_shell(prompt, tmp_path):
    """The shell hands curl the JSON as it is; a stand-in for curl writes it down."""
    canary = {"prompt": prompt, "base": "a", "baked": "b"}
    (line,) = [
        line for line in render_card(equivalence(canary=canary)).splitlines() if "$ curl" in line
    ]
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\nfor last; do :; done\nprintf %s "$last"\n')
    curl.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sent = subprocess.run(
        ["sh", "-c", line.removeprefix("$ ")], env=environment, capture_output=True, check=True
    )
    assert json.loads(sent.stdout) == {
        "model": "NAME", "prompt": prompt, "max_tokens": 20, "temperature": 0,
    }  # fmt: skip


def test_text_in_a_cell_is_no_html():
    card = render_card(equivalence(canary={"prompt": "<b>&amp;", "base": "a", "baked": "b"}))
    assert '| prompt | "&lt;b>&amp;amp;" |' in card


def test_canary_is_shown_where_there_is_one():
    assert '| this model | " was bright" |' in render_card(values())
    assert "Canary" not in render_card(equivalence(canary=None))


@pytest.mark.parametrize("text", ["It's the day", "a | b", "über"])
def test_canary_prompt_is_readable_and_keeps_the_table(text):
    """The reader is to copy the prompt, so it stands there as it is, in a table of two columns."""
    card = render_card(equivalence(canary={"prompt": text, "base": "a", "baked": "b"}))
    (line,) = [line for line in card.splitlines() if line.startswith("| prompt |")]
    cells = line.replace("\\|", "¦").strip("|").split("|")
    assert len(cells) == 2
    assert text.replace("|", "¦") in cells[1]


@pytest.mark.parametrize("key", TOP_KEYS)
def test_missing_value_is_an_error(key):
    incomplete = values()
    del incomplete[key]
    with pytest.raises(CheckpointError, match=key):
        render_card(incomplete)


@pytest.mark.parametrize("key", EQUIVALENCE_KEYS)
def test_missing_figure_of_the_proof_is_an_error(key):
    incomplete = values()
    del incomplete["equivalence"][key]
    with pytest.raises(CheckpointError, match=key):
        render_card(incomplete)


@pytest.mark.parametrize("key", ["layer", "activation_norm", "coefficient"])
def test_missing_figure_of_a_layer_is_an_error(key):
    incomplete = values()
    del incomplete["layers"][1][key]
    with pytest.raises(CheckpointError, match=key):
        render_card(incomplete)


def test_added_layers_are_told_with_what_they_cost():
    assert "were added" not in render_card(values())
    card = render_card(values(added_layers=3, layer_count=6))
    assert "3 decoder layers were added" in card
    assert "grow by 50 %" in card


def test_template_asks_for_nothing_else():
    source = (shipped("model_cards") / CARD_TEMPLATE).read_text(encoding="utf-8")
    assert meta.find_undeclared_variables(card_environment().parse(source)) <= {
        *CARD_VALUES,
        "ablation",
        "directions",
        "orthogonalized",
        "removed",
        "repo_id",
        "revision",
        "thin",
        "front_matter",
        "left_out_lines",
        "licence_lines",
    }


def test_card_ends_with_a_newline_and_has_no_leftover_markup():
    card = render_card(values())
    assert card.endswith("\n")
    assert "{{" not in card
    assert "{%" not in card


def test_cost_on_neutral_text_is_told():
    card = render_card(CARD_VALUES)
    assert "On the 211 tokens of the equivalence prompts" in card
    assert "0.21 nats a token, 95th percentile 0.87; 81 % of the most likely tokens stay." in card
    assert "add up to 41 % of the activation norm of its last layer" in card


def test_card_of_a_bake_that_knows_no_cost_tells_none():
    older = {key: value for key, value in CARD_VALUES["equivalence"].items() if key != "cost"}
    assert "costs on neutral text" not in render_card(values(equivalence=older))


def test_what_base_and_bake_write_stands_side_by_side():
    card = render_card(CARD_VALUES)
    assert "## What it writes" in card
    assert '| "The day" | " was \\| grey" | " was bright" |' in card
