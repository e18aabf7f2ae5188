"""What arms do to texts: three measurements, each with hooks on one loaded model.

All arms (multipliers, laws, bands, sites, injections and random controls) of one text go through in one
batch, and sampled text shares its noise between arms, so every comparison is paired.

    pairs      log-likelihood of both completions of held-out contrast pairs: shift, accuracy, and the
               perplexity of on-axis and opposite text
    neutral    perplexity of neutral text, KL(base ‖ arm) per token
    rollouts   sampled continuations: target words, perplexity under the base, repetition, KL(arm ‖ base)

What comes out are plain values; `summary` makes figures of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bake.errors import PromptError
from bake.models.forward import LanguageModel, decode
from bake.models.generation import draw_noise
from bake.support.processes import divide, put_together
from bake.support.progress import track
from bake.sweeps.arms import Arm, compare_arms, rows_per_forward, steered_rows
from bake.texts.chats import encode_replies, encode_requests
from bake.texts.pair_tokens import encode_pairs, is_rendered, is_templated
from bake.texts.pairs import ContrastPair
from bake.texts.prompts import encode, position_limit, without_prefix
from bake.texts.protocols import Tokenizer

if TYPE_CHECKING:
    import torch

Tokens = tuple[int, ...]
Scorer = Callable[[str], float]
NEUTRAL_TOKENS = 256  # of each text; perplexity settles long before


@dataclass(frozen=True)
class Texts:
    """What the arms are run on. openings are continued; neutral texts must be left alone.

    requests: continued instead of the openings where they are conversations; empty: the openings are.
    """

    pairs: tuple[ContrastPair, ...]
    neutral: tuple[str, ...]
    openings: tuple[str, ...]
    words: frozenset[str] = frozenset()
    chat_template: str = "auto"
    requests: tuple[str, ...] = ()

    def suited_to(self, tokenizer: Tokenizer) -> Texts:
        """Return the texts with the openings that a tokenizer's model is to continue."""
        chats = self.requests and is_templated(tokenizer, self.chat_template)
        return replace(self, openings=self.requests if chats else self.openings, requests=())


@dataclass(frozen=True)
class Sampling:
    """How continuations are sampled; one noise for every arm."""

    samples: int = 2
    new_tokens: int = 40
    temperature: float = 1.0
    seed: int = 0


# What texts gave: {arm's name: {figure: one value a text, or one a continuation}}, ready for JSON.
Measurements = dict[str, dict[str, list[Any]]]
# Measures texts one by one: (texts, label of a progress bar, text → its measurements).
Each = Callable[[Sequence[Any], str, Callable[[Any], Measurements]], Measurements]


def measure_each(
    texts: Sequence[Any], label: str, measure: Callable[[Any], Measurements]
) -> Measurements:
    """Measure every text, each in one of the processes there are, and join what they gave."""
    return join(put_together([measure(text) for text in track(divide(texts), label)]))


def join(parts: Sequence[Measurements]) -> Measurements:
    """Return the measurements of many texts, in their order."""
    joined: Measurements = {}
    for part in parts:
        for name, figures in part.items():
            for figure, values in figures.items():
                joined.setdefault(name, {}).setdefault(figure, []).extend(values)
    return joined


def measure_pairs(
    loaded: LanguageModel,
    arms: Sequence[Arm],
    pairs: Sequence[ContrastPair],
    each: Each = measure_each,
    *,
    chat_template: str = "auto",
) -> Measurements:
    """Score both completions of every pair: {arm: {"positive" | "negative": [[nats, tokens], …]}}.

    chat_template: as for finding a direction, see `encode_pairs`. Raises PromptError for a pair
    that the model has not enough positions for.
    """
    limit = position_limit(loaded.config)
    groups = [
        (group, _encode(loaded.tokenizer, pairs, prefix, chat_template))
        for group, prefix in _by_instruction(arms)
    ]

    def measure(index: int) -> Measurements:
        found: Measurements = {arm.name: {} for arm in arms}
        for group, encoded in groups:
            sides = zip(("positive", "negative"), encoded[index], pairs[index].texts(), strict=True)
            for side, (ids, start), text in sides:
                _check_length(len(ids), limit, "pair", text)
                for arm, logs in compare_arms(loaded, group, ids, start, start=start):
                    nats = -float(_chosen(logs, ids[start:]).sum())
                    found[arm.name][side] = [[nats, len(ids) - start]]
        return found

    return each(range(len(pairs)), "contrast pairs", measure)


def measure_neutral(
    loaded: LanguageModel,
    arms: Sequence[Arm],
    texts: Sequence[str],
    each: Each = measure_each,
    *,
    chat_template: str = "auto",
) -> Measurements:
    """Run neutral texts: {arm: {"nats": [per text], "tokens": […], "kl": [[per token] per text]}}.

    kl is KL(base ‖ arm) in nats. `arms` begins with the base. Arms that only a prompt distinguishes
    are left out: an instruction, and a push at a prompt's last token, do nothing to a text alone.
    Texts are cut at 256 tokens, and at the model's positions. chat_template: "auto" makes every second
    text a reply where the tokenizer has a template; only the reply's tokens count then. Raises
    PromptError where no text has two tokens.
    """
    shared = [arm for arm in arms if not arm.instruction and arm.injection == "broadcast"]
    most = min(NEUTRAL_TOKENS, position_limit(loaded.config) or NEUTRAL_TOKENS)
    encoded = encode_neutral(loaded.tokenizer, texts, most, chat_template)
    if not encoded:
        raise PromptError("the neutral texts have no two tokens to predict; give longer ones")

    def measure(text: tuple[Tokens, int]) -> Measurements:
        ids, start = text
        found: Measurements = {}
        reference: torch.Tensor | None = None
        for arm, logs in compare_arms(loaded, shared, ids, start=start):
            reference = logs if reference is None else reference
            found[arm.name] = {
                "nats": [-float(_chosen(logs, ids[start:]).sum())],
                "tokens": [len(ids) - start],
                "kl": [_round(_divergence(reference, logs))],
            }
        return found

    return each(encoded, "neutral texts", measure)


def encode_neutral(
    tokenizer: Tokenizer, texts: Sequence[str], most: int, chat_template: str
) -> list[tuple[Tokens, int]]:
    """Return each text's ids and where it begins to count, the texts in their order."""
    replies = texts[1::2] if is_templated(tokenizer, chat_template) else ()
    chats = iter(encode_replies(tokenizer, replies, most))
    plain = iter(
        encode(tokenizer, [t for n, t in enumerate(texts) if not (replies and n % 2)], most)
    )
    found = [
        next(chats) if replies and number % 2 else (next(plain).ids, 1)
        for number in range(len(texts))
    ]
    return [(ids, start) for ids, start in found if len(ids) > start]


def measure_rollouts(
    loaded: LanguageModel,
    arms: Sequence[Arm],
    openings: Sequence[str],
    sampling: Sampling,
    each: Each = measure_each,
    *,
    chat_template: str = "auto",
) -> Measurements:
    """Sample continuations of every opening under every arm, and score them under arm and base.

    Returns {arm: {"ids": [[…]], "nats": […], "kl": [[…]]}}, openings × samples entries each. nats are
    the base's; kl is KL(arm ‖ base) per sampled token. chat_template: "auto" makes openings a user's
    messages where the tokenizer has a template, and what is sampled replies. Raises PromptError for an
    opening without a token, and for one that leaves the model no positions to continue it.
    """
    tokenizer = loaded.tokenizer
    stop = getattr(tokenizer, "eos_token_id", None)
    limit = position_limit(loaded.config)
    bare = encode_openings(tokenizer, openings, chat_template)
    groups = [
        (group, encode_openings(tokenizer, openings, chat_template, prefix) if prefix else bare)
        for group, prefix in _by_instruction(arms)
    ]

    def measure(numbered: tuple[int, str]) -> Measurements:
        index, opening = numbered
        found: Measurements = {}
        for group, prompts in groups:
            prompt, plain = prompts[index], bare[index]
            rows = [(arm, sample) for arm in group for sample in range(sampling.samples)]
            if not prompt:
                raise PromptError(f"the opening {opening!r} has no token to continue; write a word")
            width = len(prompt) + sampling.new_tokens
            _check_length(width, limit, "opening with its continuation", opening)
            step = rows_per_forward(loaded, width, cached=True)
            for start in range(0, len(rows), step):
                chunk = rows[start : start + step]
                drawn = _continue(loaded, chunk, prompt, index, sampling)
                drawn = [_cut(tokens, stop) for tokens in drawn]
                scored = _score(loaded, chunk, prompt, plain, drawn)
                for (arm, _), ids, (nats, kl) in zip(chunk, drawn, scored, strict=True):
                    entry = found.setdefault(arm.name, {"ids": [], "nats": [], "kl": []})
                    entry["ids"].append(list(ids))
                    entry["nats"].append(nats)
                    entry["kl"].append(kl)
        return found

    return each(list(enumerate(openings)), "sampled text", measure)


def encode_openings(
    tokenizer: Tokenizer, openings: Sequence[str], chat_template: str, prefix: str = ""
) -> list[Tokens]:
    """Return the ids that each opening's continuation follows. prefix: text put before every one."""
    if is_templated(tokenizer, chat_template):
        return encode_requests(tokenizer, openings, prefix)
    stop = getattr(tokenizer, "eos_token_id", None)
    texts = [_put_before(tokenizer, prefix, opening) for opening in openings]
    return [_without_end(text.ids, stop) for text in encode(tokenizer, texts, None)]


def _check_length(tokens: int, limit: int | None, what: str, text: str) -> None:
    if limit is not None and tokens > limit:
        raise PromptError(
            f"the {what} {text[:40]!r} takes {tokens} positions and the model has {limit}; shorten it"
        )


def _by_instruction(arms: Sequence[Arm]) -> Iterable[tuple[list[Arm], str]]:
    """Group arms by the text that is put before every prompt, an instruction and a line break."""
    for text in dict.fromkeys(arm.instruction for arm in arms):
        yield [arm for arm in arms if arm.instruction == text], f"{text}\n" if text else ""


def _encode(
    tokenizer: Tokenizer, pairs: Sequence[ContrastPair], prefix: str, chat_template: str
) -> list[list[tuple[Tokens, int]]]:
    """Return both texts of every pair: the ids up to the completion's last, and where it begins.

    What a direction is found from as a conversation is scored as one; `prefix` opens what is asked then.
    """
    asked = [_ask(tokenizer, pair, prefix) for pair in pairs]
    chats = [pair for pair in asked if is_rendered(tokenizer, pair, chat_template)]
    rendered = iter(encode_pairs(tokenizer, chats, chat_template=chat_template) if chats else ())
    found = []
    for pair in asked:
        if is_rendered(tokenizer, pair, chat_template):
            encoded = next(rendered)
            sides = zip(encoded.texts, encoded.completions, strict=True)
            found.append([(text.ids[: places[-1] + 1], places[0]) for text, places in sides])
        else:
            texts = (pair.positive, pair.negative)
            found.append([_split(tokenizer, pair.prompt, text) for text in texts])
    return found


def _put_before(tokenizer: Tokenizer, prefix: str, text: str) -> str:
    """Put an instruction before a text, which then begins no sequence."""
    return prefix + without_prefix(tokenizer, text) if prefix else text


def _ask(tokenizer: Tokenizer, pair: ContrastPair, prefix: str) -> ContrastPair:
    """Put an instruction before what a pair begins with."""
    if not prefix:
        return pair
    if pair.before is None:
        return replace(pair, prompt=_put_before(tokenizer, prefix, pair.prompt))
    first, second = (
        ({**messages[0], "content": prefix + messages[0]["content"]}, *messages[1:])
        if messages
        else ({"role": "user", "content": prefix},)
        for messages in pair.before
    )
    return replace(pair, before=(first, second))


def _split(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[Tokens, int]:
    """Return the ids of prompt + completion and how many of them are the prompt's; at least one."""
    end = getattr(tokenizer, "eos_token_id", None)
    text = encode(tokenizer, [prompt + completion], None)[0]
    ids = _without_end(text.ids, end)
    if tokenizer.is_fast:
        start = sum(stop <= len(prompt) for _, stop in text.offsets[: len(ids)])
    else:
        start = len(_without_end(encode(tokenizer, [prompt], None)[0].ids, end))
    start = max(1, min(start, len(ids)))
    if start >= len(ids):
        raise PromptError(
            f"the completion {completion!r} has no token of its own; write a longer one"
        )
    return ids, start


def _chosen(logs: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return log p of each of the tokens that follow the first position, (tokens,)."""
    import torch

    targets = torch.tensor(list(ids), device=logs.device)
    return logs[: len(ids)].gather(-1, targets[:, None])[:, 0].double()


def _divergence(left: torch.Tensor, right: torch.Tensor) -> list[float]:
    """Return KL(left ‖ right) in nats at every position, from log-probabilities."""
    values = (left.exp() * (left - right)).sum(-1).clamp(min=0)
    return [float(value) for value in values]


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _continue(
    loaded: LanguageModel,
    rows: Sequence[tuple[Arm, int]],
    prompt: Tokens,
    index: int,
    sampling: Sampling,
) -> list[Tokens]:
    import torch

    cache: dict[tuple[int, int], torch.Tensor] = {}

    def noise(sample: int, step: int, size: int) -> torch.Tensor:
        if (sample, step) not in cache:
            cache[sample, step] = draw_noise(sampling.seed, index, sample, step, size)
        return cache[sample, step]

    def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
        drawn = [noise(sample, step, logits.shape[-1]) for _, sample in rows]
        return (logits / sampling.temperature + torch.stack(drawn)).argmax(dim=-1)

    tokens = torch.tensor([list(prompt)] * len(rows))
    with steered_rows(loaded, [arm for arm, _ in rows], len(prompt)):
        return [tuple(row) for row in decode(loaded, tokens, sampling.new_tokens, choose).tolist()]


def _score(
    loaded: LanguageModel,
    rows: Sequence[tuple[Arm, int]],
    prompt: Tokens,
    plain: Tokens,
    drawn: Sequence[Tokens],
) -> list[tuple[float, list[float]]]:
    """Return (nats under the base, KL(arm ‖ base) per token) of each row's continuation.

    The base never sees an instruction: its prompt is `plain`.
    """
    arms = [arm for arm, _ in rows]
    steered = _logs_after(loaded, arms, prompt, drawn)
    base = _logs_after(loaded, [Arm("base", "base")] * len(rows), plain, drawn)
    scored = []
    for ids, own, under in zip(drawn, steered, base, strict=True):
        nats = -sum(float(under[place, token]) for place, token in enumerate(ids))
        scored.append((nats, _round(_divergence(own, under))))
    return scored


def _logs_after(
    loaded: LanguageModel,
    arms: Sequence[Arm],
    prompt: Tokens,
    drawn: Sequence[Tokens],
) -> list[torch.Tensor]:
    """Return, for each row, the log-probabilities (tokens, vocabulary) that its continuation met."""
    import torch

    width = len(prompt) + max((len(ids) for ids in drawn), default=0)
    step = rows_per_forward(loaded, width)
    found = []
    for start in range(0, len(arms), step):
        texts = [prompt + ids for ids in drawn[start : start + step]]
        tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, text in enumerate(texts):  # padded on the right, where nothing looks back
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with (
            torch.no_grad(),
            steered_rows(loaded, arms[start : start + step], len(prompt)),
        ):
            logits = loaded.model(
                tokens.to(loaded.device), attention_mask=mask.to(loaded.device), use_cache=False
            ).logits
        for row, text in enumerate(texts):
            kept = logits[row, len(prompt) - 1 : len(text) - 1]
            found.append(kept.float().log_softmax(-1).cpu())
    return found


def _cut(tokens: Tokens, stop: int | None) -> Tokens:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def _without_end(ids: Tokens, end: int | None) -> Tokens:
    return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids
