"""Pairs as tokens: prompt and completion rendered together, and which tokens the completion is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakSet

from bake.errors import DirectionError, PromptError
from bake.support.progress import announce
from bake.texts.pairs import ContrastPair
from bake.texts.prompts import Encoded, encode
from bake.texts.protocols import Tokenizer
from bake.texts.rendering import (
    TEMPLATE_DATE,
    Conversation,
    Message,
    Rendering,
    has_template,
    reads_date,
    render,
)

CHAT_TEMPLATES = ("auto", "never")
# Of whose templates the user was told: a command renders pairs with one tokenizer many times.
_TOLD: WeakSet[Tokenizer] = WeakSet()


@dataclass(frozen=True)
class EncodedPair:
    """Both texts as tokens, the positions of their completions' tokens, and the length of the prefix
    of token ids that they share, which leaves each of them at least one token of its own."""

    texts: tuple[Encoded, Encoded]
    completions: tuple[tuple[int, ...], tuple[int, ...]]
    shared: int


@dataclass(frozen=True)
class _Span:
    """A text ready for the tokenizer and the characters [start, stop) of its completion.

    rendered: by a chat template, which has already written the special tokens.
    """

    text: str
    start: int
    stop: int
    rendered: bool


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[ContrastPair],
    *,
    chat_template: str = "auto",
    limit: int | None = None,
) -> list[EncodedPair]:
    """Tokenise pairs. A text longer than `limit` positions loses tokens after its first, never its end.

    chat_template: "auto" renders conversations, and prompts with their completions, by the tokenizer's
    template where it has one; "never" leaves plain texts as they are. Raises PromptError for a
    conversation without a template or one that the template refuses.
    """
    templated = is_templated(tokenizer, chat_template)
    spans = _spans(tokenizer, [_as_chat(pair) if templated else pair for pair in pairs], templated)
    encoded = _encode_spans(tokenizer, spans)
    completions = [
        _completion_positions(tokenizer, text, span)
        for text, span in zip(encoded, spans, strict=True)
    ]
    found = [
        EncodedPair(
            (encoded[i], encoded[i + 1]),
            (completions[i], completions[i + 1]),
            _shared_prefix(encoded[i].ids, encoded[i + 1].ids),
        )
        for i in range(0, len(encoded), 2)
    ]
    return found if limit is None else _fit(found, limit)


def is_rendered(tokenizer: Tokenizer, pair: ContrastPair, chat_template: str) -> bool:
    """Tell whether `encode_pairs` renders a pair by the tokenizer's chat template, or has to refuse it."""
    templated = is_templated(tokenizer, chat_template)
    return pair.before is not None or (templated and bool(pair.prompt.strip()))


def describe_template(
    tokenizer: Tokenizer, pairs: Sequence[ContrastPair], chat_template: str
) -> dict[str, str]:
    """Return what is recorded of a template that renders pairs: the day that it saw, if it asks for one."""
    rendered = any(is_rendered(tokenizer, pair, chat_template) for pair in pairs)
    if not rendered or not has_template(tokenizer) or not reads_date(tokenizer):
        return {}
    return {"template_date": TEMPLATE_DATE.isoformat()}


def is_templated(tokenizer: Tokenizer, chat_template: str) -> bool:
    """Tell whether texts are made conversations; raise PromptError for an unknown `chat_template`."""
    if chat_template not in CHAT_TEMPLATES:
        raise PromptError(
            f"unknown chat template {chat_template!r}; one of {', '.join(CHAT_TEMPLATES)}"
        )
    return chat_template == "auto" and has_template(tokenizer)


def _as_chat(pair: ContrastPair) -> ContrastPair:
    """Make a prompt with two completions a user's message with two replies; leave whole texts alone."""
    if pair.before is not None or not pair.prompt.strip():
        return pair
    asked: tuple[Message, ...] = ({"role": "user", "content": pair.prompt.strip()},)
    return ContrastPair("", pair.positive.strip(), pair.negative.strip(), (asked, asked))


def _spans(tokenizer: Tokenizer, pairs: Sequence[ContrastPair], templated: bool) -> list[_Span]:
    """Return both texts of every pair, conversations rendered and said to be."""
    conversations: list[Conversation] = []
    for number, pair in enumerate(pairs, start=1):
        if pair.before is None:
            continue
        if not templated:
            raise PromptError(
                f"pair {number} is a conversation and no chat template is applied: "
                "write prompt, positive and negative as plain texts"
            )
        for before, text in zip(pair.before, (pair.positive, pair.negative), strict=True):
            # What the model would have seen when it wrote this reply, and nothing after it.
            opens = pair.role == "assistant"
            last = () if opens else ({"role": pair.role, "content": text.strip()},)
            conversations.append(Conversation((*before, *last), opens, f"pair {number}"))
    if conversations:
        rendering = render(tokenizer, conversations)
        if tokenizer not in _TOLD:
            _TOLD.add(tokenizer)
            _announce_template(rendering)
        texts = iter(rendering.texts)
    spans = []
    for number, pair in enumerate(pairs, start=1):
        for text in (pair.positive, pair.negative):
            if pair.before is None:
                whole = pair.prompt + text
                spans.append(_Span(whole, len(pair.prompt), len(whole), rendered=False))
            else:
                spans.append(_place(next(texts), text.strip(), pair.role, number))
    return spans


def _place(rendered: str, text: str, role: str, number: int) -> _Span:
    """Put a reply behind the opening that was rendered for it, or find a message where it was rendered."""
    if role == "assistant":
        return _Span(rendered + text, len(rendered), len(rendered) + len(text), rendered=True)
    start = rendered.rfind(text)
    if start < 0:
        raise PromptError(f"pair {number}: the chat template changes the last message's text")
    return _Span(rendered, start, start + len(text), rendered=True)


def _announce_template(rendering: Rendering) -> None:
    announce("the tokenizer's chat template is applied: completions are the assistant's replies")
    if rendering.switched:
        switches = ", ".join(f"{name}=False" for name in rendering.switched)
        announce(f"the chat template's thoughts are switched off ({switches})")
    if rendering.closed:
        announce(
            f"the chat template leads into a thought; {rendering.closed} ends it, so that completions are "
            "replies"
        )


def _encode_spans(tokenizer: Tokenizer, spans: Sequence[_Span]) -> list[Encoded]:
    """Tokenise rendered texts without the special tokens that the template has already written."""
    encoded: dict[int, Encoded] = {}
    for is_chat in (False, True):
        chosen = [index for index, span in enumerate(spans) if span.rendered == is_chat]
        texts = [spans[index].text for index in chosen]
        found = encode(tokenizer, texts, None, special_tokens=not is_chat)
        encoded.update(zip(chosen, found, strict=True))
    return [encoded[index] for index in range(len(spans))]


def _completion_positions(tokenizer: Tokenizer, text: Encoded, span: _Span) -> tuple[int, ...]:
    """Return the content tokens that end inside the completion; the last one before it where none does."""
    content = [position for position, is_content in enumerate(text.content) if is_content]
    if not content:
        raise DirectionError("a text of the pairs has no content token; write longer texts")
    if any(stop for _, stop in text.offsets):
        inside = [p for p in content if span.start < text.offsets[p][1] <= span.stop]
        before = [p for p in content if text.offsets[p][1] <= span.stop]
        return tuple(inside or before[-1:] or content[-1:])
    # A tokenizer without offsets: count the tokens of what goes before and of what goes on to the end.
    edges = encode(
        tokenizer,
        [span.text[: span.start], span.text[: span.stop]],
        None,
        special_tokens=not span.rendered,
    )
    first, last = (_common(text.ids, edge.ids) for edge in edges)
    inside = [p for p in content if (first if span.start else 0) <= p < last]
    return tuple(inside or content[-1:])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def _shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    return min(_common(first, second), len(first) - 1, len(second) - 1)


def _fit(pairs: Sequence[EncodedPair], limit: int) -> list[EncodedPair]:
    """Cut what is too long for the model's positions out of the prompt, behind the first token."""
    long = sum(max(len(text.ids) for text in pair.texts) > limit for pair in pairs)
    if long:
        announce(
            f"{long} of {len(pairs)} pairs cut to the model's {limit} positions: their prompts lose "
            "what follows the first token"
        )
    return [_fit_pair(pair, limit) for pair in pairs]


def _fit_pair(pair: EncodedPair, limit: int) -> EncodedPair:
    lengths = [len(text.ids) for text in pair.texts]
    excess = max(lengths) - limit
    if excess <= 0:
        return pair
    # The same tokens go from both texts where the shared prompt has that many to lose.
    drops = [excess, excess] if excess < pair.shared else [max(0, n - limit) for n in lengths]
    texts, completions = [], []
    for text, completion, drop in zip(pair.texts, pair.completions, drops, strict=True):
        kept = replace(
            text,
            ids=text.ids[:1] + text.ids[1 + drop :],
            content=text.content[:1] + text.content[1 + drop :],
            offsets=text.offsets[:1] + text.offsets[1 + drop :],
        )
        texts.append(kept)
        completions.append(tuple(p - drop for p in completion if p > drop))
    first, second = texts
    return EncodedPair(
        (first, second), (completions[0], completions[1]), _shared_prefix(first.ids, second.ids)
    )
