"""The tokenizer of the output must read text as the base's does, whatever its config calls the model.

Its files travel byte for byte, but transformers picks the class by `tokenizer_config.json` *and* by the
config's model type, and some classes build parts anew instead of reading them. So both are loaded and
compared on texts; where only the choice of class differs, the class is written down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bake.checkpoint.config_json import edit_json
from bake.checkpoint.loading import quiet_transformers
from bake.errors import CheckpointError, PromptError
from bake.texts.prompts import load_tokenizer, read_prompts
from bake.texts.protocols import Tokenizer
from bake.texts.rendering import Conversation, has_template, render

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERIC_CLASS = "TokenizersBackend"  # reads tokenizer.json and builds nothing anew
SETS = ("equivalence", "neutral")
# What tokenizers are known to differ in: white space, digits, scripts, marks, emoji, code, nothing.
TEXTS = (
    "",
    " ",
    "  two spaces before, one behind ",
    "tabs\tand\n\nempty lines\r\n    and an indent",
    "1234567 + 89,000.50 = 2026-11-20",
    "naïve café, e\u0301 combined, ﬁ ligature, ＦＵＬＬ width, \u00a0no-break, zero\u200bwidth",
    "Grüße aus Köln; Доброе утро; Καλημέρα; שלום עולם; السلام عليكم; नमस्ते दुनिया; สวัสดีชาวโลก",
    "今日はいい天気ですね。你好，世界！안녕하세요 세계",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-3]}  # don't\n",
    "https://example.org/a?b=c&d=%20 <b>bold</b> \\n {{x}} I'LL we'Ve",
)
CONVERSATION = (
    {"role": "user", "content": "Hello,  who are you?"},
    {"role": "assistant", "content": "A model.\nAnd you?"},
    {"role": "user", "content": " Ein Mensch."},
)


def keep_tokenizer(base: Any, directory: Path) -> str | None:
    """See to it that `directory` tokenizes as `base`, the base's loaded tokenizer.

    Returns a sentence to announce where `tokenizer_class` had to be written. Raises CheckpointError
    with the first text that differs where that does not help.
    """
    texts = [*TEXTS, *(text for name in SETS for text in read_prompts(name))]
    difference = _compare(base, directory, texts)
    if difference is None:
        return None
    path = directory / TOKENIZER_CONFIG
    original = path.read_text(encoding="utf-8") if path.is_file() else None
    for name in dict.fromkeys((type(base).__name__, GENERIC_CLASS)):
        _replace(path, edit_json(original or "{}", {"tokenizer_class": name}))
        if _compare(base, directory, texts) is None:
            return (
                f"tokenizer_class is now {name} in {TOKENIZER_CONFIG}: by the new model type alone "
                f"transformers would choose another"
            )
    raise CheckpointError(
        f"the output's tokenizer is not the base's ({type(base).__name__}): {difference}; "
        f"choose another route"
    )


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)  # It could share its bytes with the base's file.
    path.write_text(text, encoding="utf-8", newline="")


def _compare(base: Any, directory: Path, texts: Sequence[str]) -> str | None:
    """Return a phrase for the first difference; None where there is none."""
    try:
        with quiet_transformers():
            output = load_tokenizer(directory)
    except CheckpointError as error:
        return str(error)
    return next(_differences(base, output, texts), None)


def _differences(base: Any, output: Any, texts: Sequence[str]) -> Iterator[str]:
    special = "".join(f"a {token}b" for token in base.all_special_tokens)
    for text in (*texts, special):
        ids = base(text)["input_ids"]
        if output(text)["input_ids"] != ids:
            yield f"{text!r} becomes other tokens"
        elif output.decode(ids) != base.decode(ids):
            yield f"{text!r} is decoded otherwise"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(output, name) != getattr(base, name):
            yield f"{name} is {getattr(output, name)}, not {getattr(base, name)}"
    if _template_of(output) != _template_of(base) and _render(output) != _render(base):
        yield "the chat template renders a conversation otherwise"


def _template_of(tokenizer: Tokenizer) -> Any:
    """Return all that decides what a chat template renders."""
    return tokenizer.chat_template, tokenizer.special_tokens_map


def _render(tokenizer: Tokenizer) -> Any:
    """Return a conversation as the chat template gives it, or the template's own refusal."""
    if not has_template(tokenizer):
        return None
    try:
        return render(tokenizer, [Conversation(CONVERSATION, True, "a conversation")]).texts
    except PromptError as error:
        return str(error)
