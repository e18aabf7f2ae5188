"""Chat templates: rendered as transformers does, on a fixed day, outside of thoughts, within bounds."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from conftest import byte_tokenizer
from transformers.utils import chat_template_utils

from bake.errors import PromptError
from bake.texts.pair_tokens import describe_template, encode_pairs
from bake.texts.pairs import ContrastPair
from bake.texts.rendering import Conversation, render

ASKED = ({"role": "user", "content": "How was it?"},)
LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}Today: {{ date_string }}\n{% for m in messages %}[{{ m['role'] }}]"
    "{{ m['content'] | trim }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SMOLLM = (
    '{%- set today = strftime_now("%d %B %Y") -%}Today: {{ today }}\n'
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def chat_tokenizer(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def open_turn(template, messages=ASKED):
    (text,) = render(chat_tokenizer(template), [Conversation(messages, True, "pair 1")]).texts
    return text


class Clock(datetime):
    """A clock that stands at a day of its own."""

    day = datetime(2030, 1, 2)

    @classmethod
    def now(cls, tz=None):
        return cls.day


@pytest.mark.parametrize("template", [LLAMA, SMOLLM])
def test_two_days_give_the_same_texts(template, monkeypatch):
    tokenizer = chat_tokenizer(template)
    pairs = [ContrastPair("How was it?", "Good.", "Bad.")]
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    found, theirs = [], []
    for day in (datetime(2030, 1, 2), datetime(2031, 3, 4)):
        monkeypatch.setattr(Clock, "day", day)
        found.append(encode_pairs(tokenizer, pairs))
        theirs.append(tokenizer.apply_chat_template(list(ASKED), tokenize=False))
    assert theirs[0] != theirs[1]  # The clock is the one that a template reads.
    assert found[0] == found[1]
    assert "2024" in open_turn(template)


def test_the_day_is_recorded_where_a_template_sees_it():
    prompted, whole = ContrastPair("How?", "Good.", "Bad."), ContrastPair("", "Good.", "Bad.")
    tokenizer = chat_tokenizer(LLAMA)
    assert describe_template(tokenizer, [whole, prompted], "auto") == {
        "template_date": "2024-07-26"
    }
    assert describe_template(tokenizer, [whole], "auto") == {}
    assert describe_template(tokenizer, [prompted], "never") == {}
    assert describe_template(chat_tokenizer("{{ messages }}"), [prompted], "auto") == {}
    assert describe_template(byte_tokenizer(), [prompted], "auto") == {}


FEATURES = """{%- set ns = namespace(count=0) %}
{%- for m in messages %}
    {%- if loop.index > 8 %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set fields = dict(role=m.role, **{'ü': [1, none]}) %}
    {% generation %}{{ m | tojson }}{{ fields | tojson(indent=2) }}{% endgeneration %}
{%- endfor %}
{{ ns.count }} {{ bos_token }} {{ tools is none }} {{ messages[::-1][0].content.split('w')[-1] }}
{% if add_generation_prompt %}<go>{% endif %}
"""


@pytest.mark.parametrize("opens", [True, False])
def test_templates_are_rendered_as_transformers_does(opens):
    tokenizer = chat_tokenizer(FEATURES)
    messages = (*ASKED, {"role": "assistant", "content": "<b>Good</b> — “fine”"}, *ASKED)
    theirs = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=opens
    )
    assert "“fine”" in theirs
    assert ("<go>" in theirs) == opens
    (ours,) = render(tokenizer, [Conversation(messages, opens, "pair 1")]).texts
    assert ours == theirs


TURN = (
    "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}[assistant]"
)
QWEN = TURN + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DEEPSEEK = TURN + (
    "{% if not thinking is defined %}{% set thinking = true %}{% endif %}"
    "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (QWEN, "[assistant]<think>\n\n</think>\n\n"),
        (DEEPSEEK, "[assistant]</think>"),
        (TURN + "<think>\n{% endif %}", "[assistant]<think>\n\n</think>\n\n"),
        (TURN + "<think>{% endif %}", "[assistant]<think></think>"),
        (TURN + "[THINK]{% endif %}", "[assistant][THINK][/THINK]"),
        (
            TURN + "<|START_THINKING|>{% endif %}",
            "[assistant]<|START_THINKING|><|END_THINKING|>",
        ),
        (
            TURN + "<|start|>assistant<|channel|>analysis<|message|>{% endif %}",
            "<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        (
            "{% if 0 %}<|channel|>final<|message|>{% endif %}"
            + TURN
            + "<|start|>assistant{% endif %}",
            "<|start|>assistant<|channel|>final<|message|>",
        ),
        (TURN + "</think>{% endif %}", "[assistant]</think>"),
        (TURN + "{% endif %}", "[assistant]"),
    ],
)
def test_a_reply_begins_outside_of_thoughts(template, end):
    assert open_turn(template).endswith(end)


def test_leaving_a_thought_is_announced(capsys):
    pairs = [ContrastPair("How was it?", "Good.", "Bad.")]
    encode_pairs(chat_tokenizer(TURN + "<think>\n{% endif %}"), pairs)
    assert "leads into a thought; </think> ends it" in capsys.readouterr().err
    encode_pairs(chat_tokenizer(DEEPSEEK), pairs)
    assert "switched off (thinking=False)" in capsys.readouterr().err
    encode_pairs(chat_tokenizer(TURN + "{% endif %}"), pairs)
    assert "thought" not in capsys.readouterr().err


def test_a_thought_that_a_user_writes_is_not_closed():
    asked = ({"role": "user", "content": "What is <think>"},)
    assert open_turn(TURN + "{% endif %}", asked).endswith("<think>|[assistant]")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "does not end within 2 s",
            id="loops",
        ),
        pytest.param("{{ 'x' * 10**11 }}", "more than is allowed", id="long-string"),
        pytest.param("{{ ('%' ~ 10**10 ~ 'd') % 1 }}", "more than is allowed", id="wide-format"),
        pytest.param(
            "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
            "more than is allowed",
            id="much-text",
        ),
        pytest.param(
            "{% set ns = namespace(a='x') %}"
            "{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
            "more than is allowed",
            id="doubling",
        ),
        pytest.param("{{ 10 ** (10 ** 10) }}", "does not end|more than is allowed", id="power"),
        pytest.param(
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "calls itself without end",
            id="recursion",
        ),
        pytest.param(
            "{{ messages[0].content.a.b }}", "UndefinedError|undefined|no attribute", id="undefined"
        ),
        pytest.param("{{ messages.nothing() }}", "has no attribute", id="no-method"),
        pytest.param("{{ raise_exception('no system role') }}", "no system role", id="refusal"),
        pytest.param("{{ raise_exception('a\nb') }}", "a b", id="refusal-of-two-lines"),
        pytest.param("{% for %}", "none that Jinja reads", id="syntax"),
        pytest.param("{{ 1 // 0 }}", "ZeroDivisionError", id="division"),
        pytest.param("{{ ''.__class__.__mro__ }}", "unsafe|undefined", id="sandbox"),
        pytest.param("{% include 'secret' %}", "", id="include"),
        pytest.param("x" * 1_000_001, "above the 1000000 allowed", id="long-template"),
        pytest.param({"tool_use": "x"}, "no default one", id="no-default"),
        pytest.param(["x"], "is a list, not a text", id="list"),
    ],
)
def test_a_hostile_or_broken_template_is_one_line_within_seconds(template, says, monkeypatch):
    monkeypatch.setattr("bake.texts.rendering.SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(PromptError) as caught:
        open_turn(template)
    assert time.monotonic() - start < 60
    line = str(caught.value)
    assert any(part in line for part in says.split("|")), line
    assert "\n" not in line
    assert len(line) < 600


def test_chance_begins_anew_with_every_text():
    template = "{{ range(1000) | list | random }}{{ lipsum(1) }}"
    tokenizer = chat_tokenizer(template)
    one = Conversation(ASKED, False, "pair 1")
    first, second = render(tokenizer, [one, one]).texts
    assert first == second == render(tokenizer, [one]).texts[0]
