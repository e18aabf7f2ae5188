"""Conversations → texts by a tokenizer's chat template: the one place where bake renders one.

A template is a stranger's program. It runs in a process of its own with little time and memory
(`template_process.py`), sees a fixed day instead of today's, and leaves the assistant's turn where a
reply begins, not inside a thought.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from bake.errors import PromptError
from bake.texts.protocols import Tokenizer

# Templates that print today's date would give another direction tomorrow. This is the day that Llama's
# own template falls back to, so its conversations read as its makers wrote them.
TEMPLATE_DATE = date(2024, 7, 26)
_DATE_NAMES = ("strftime_now", "date_string")
# What templates read to think or not to, each off.
_SWITCHES = dict.fromkeys(("enable_thinking", "thinking", "enable_reasoning", "reasoning"), False)
# What a generation prompt may end in, white space apart → what leads from there to the reply.
_THOUGHTS = {
    "<think>": "</think>",  # Qwen, DeepSeek, Kimi, MiniMax and most others
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",  # Cohere
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi-VL
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
}
# gpt-oss opens the turn and leaves the channel to the model, which begins with its thoughts.
_HARMONY, _FINAL = "<|start|>assistant", "<|channel|>final<|message|>"

MAX_TEMPLATE = 1_000_000  # characters; the longest in use has 30,000
MAX_CHARACTERS = 10_000_000  # of one rendered text
MEMORY = 1 << 30  # bytes, of the process that renders
SECONDS = 10  # of processor time
_WAIT = 60  # seconds by the clock, for a machine that is busy
_AT_A_TIME = 500  # conversations a process

Message = Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages to be rendered; `opens`: up to where the assistant's next reply begins."""

    messages: tuple[Message, ...]
    opens: bool
    name: str  # What an error calls it: "pair 3".


@dataclass(frozen=True)
class Rendering:
    """Texts of conversations, and what was done so that a reply follows and no thought.

    switched: the template's variables that were set to false. closed: what was put behind generation
    prompts that open a thought, "" where none does.
    """

    texts: tuple[str, ...]
    switched: tuple[str, ...]
    closed: str


def has_template(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> Rendering:
    """Render conversations by the tokenizer's chat template, as of TEMPLATE_DATE.

    Raises PromptError, in one line, where the template refuses one, fails, or takes more than it may.
    """
    template = find_template(tokenizer)
    empty = next((each for each in conversations if not each.messages), None)
    if empty is not None:
        raise PromptError(
            f"{empty.name}: a chat template renders messages, and there are none before the reply"
        )
    texts: list[str] = []
    reads: list[str] = []
    for start in range(0, len(conversations), _AT_A_TIME):
        some = conversations[start : start + _AT_A_TIME]
        found = _run(template, _special_tokens(tokenizer), some)
        texts += found["texts"]
        reads = found["reads"]
    closed = ""
    for index, conversation in enumerate(conversations):
        if conversation.opens:
            end = _end_of_thought(texts[index], template)
            texts[index] += end
            closed = closed or end
    switched = tuple(name for name in _SWITCHES if name in reads)
    return Rendering(tuple(texts), switched, closed.strip())


def reads_date(tokenizer: Tokenizer) -> bool:
    """Tell whether the tokenizer's chat template asks for a day. Raises PromptError for a broken one."""
    return any(name in _variables(find_template(tokenizer)) for name in _DATE_NAMES)


def find_template(tokenizer: Tokenizer) -> str:
    """Return the tokenizer's chat template, of several the default one; raise PromptError for none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(sorted(map(str, template)))
            raise PromptError(
                f"the tokenizer has several chat templates ({names}) and no default one: name one of "
                "them default, or leave the template out (--chat-template never)"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise PromptError(
            f"the tokenizer's chat template is a {type(template).__name__}, not a text: mend it, or "
            "leave it out (--chat-template never)"
        )
    if len(template) > MAX_TEMPLATE:
        raise PromptError(
            f"the tokenizer's chat template has {len(template)} characters, above the {MAX_TEMPLATE} "
            "allowed: leave it out (--chat-template never)"
        )
    return template


@lru_cache(maxsize=8)
def _variables(template: str) -> tuple[str, ...]:
    return tuple(_run(template, {}, [])["reads"])


def _special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        name: [str(one) for one in token] if isinstance(token, list | tuple) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }


def _end_of_thought(text: str, template: str) -> str:
    """Return what leads from the end of a generation prompt out of a thought; "" where it is in none."""
    end = text.rstrip()
    for opening, closing in _THOUGHTS.items():
        if end.endswith(opening):
            # A block that begins with a line of its own ends with one, as Qwen's empty one does.
            lined = closing.startswith("</") and text.endswith("\n")
            return f"\n{closing}\n\n" if lined else closing
    return _FINAL if end.endswith(_HARMONY) and _FINAL in template else ""


def _run(
    template: str, variables: Mapping[str, Any], conversations: Sequence[Conversation]
) -> dict[str, Any]:
    """Run the template in a process of its own; return {"reads": […], "texts": […]}."""
    day = TEMPLATE_DATE
    request = {
        "template": template,
        "date": [day.year, day.month, day.day],
        "options": {"date_string": f"{day:%d} Jul {day.year}", **_SWITCHES},
        "variables": dict(variables),
        "conversations": [
            [[dict(message) for message in each.messages], each.opens] for each in conversations
        ],
        "seconds": SECONDS,
        "bytes": MEMORY,
        "characters": MAX_CHARACTERS,
    }
    # -P keeps this package's folder off the path, where a module could stand in for one of Jinja's.
    command = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))]
    try:
        finished = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            check=False,
            timeout=_WAIT,
        )
        found = json.loads(finished.stdout) if finished.returncode == 0 else None
    except subprocess.TimeoutExpired:
        found = None
    if not isinstance(found, dict):
        raise PromptError(
            f"the tokenizer's chat template does not end within {SECONDS} s and {MEMORY >> 20} MB of "
            "memory: mend it, or leave it out (--chat-template never)"
        )
    if "error" not in found:
        return found
    number = found["conversation"]
    if number is None:
        raise PromptError(
            f"the tokenizer's chat template is none that Jinja reads: {found['error']}; mend it, or leave "
            "it out (--chat-template never)"
        )
    conversation = conversations[number]
    roles = ", ".join(message["role"] for message in conversation.messages)
    raise PromptError(
        f"{conversation.name}: the chat template refuses these messages (roles: {roles}): "
        f"{found['error']}"
    )
