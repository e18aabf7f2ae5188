"""Dose and response: what a direction does at each strength, what it costs, and what chance would do.

Everything is measured with hooks on one loaded model. All arms (multipliers, laws, bands, sites,
injections and random controls) of one text go through in one batch, and sampled text shares its noise
between arms, so every comparison is paired. Figures come with bootstrap intervals over texts.

Four measurements, each kept as it is made, so that a sweep that was interrupted goes on:

    pairs      log-likelihood of both completions of held-out contrast pairs: shift, accuracy, and the
               perplexity of on-axis and opposite text
    neutral    perplexity of neutral text, KL(base ‖ arm) per token
    rollouts   sampled continuations: target words, perplexity under the base, repetition, KL(arm ‖ base)
    scorer     whatever the user's own function makes of the sampled text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bake.arms import Arm, compare_arms, rows_per_forward, steered_rows
from bake.errors import PromptError
from bake.model import LoadedModel, decode
from bake.pairs import ContrastPair
from bake.progress import track
from bake.prompts import encode
from bake.sampling import bootstrap_interval, count_words, draw_noise
from bake.sites import LayerStructure

if TYPE_CHECKING:
    import numpy as np
    import torch

Tokens = tuple[int, ...]
Scorer = Callable[[str], float]
NGRAM = 3
NEUTRAL_TOKENS = 256  # of each text; perplexity settles long before


@dataclass(frozen=True)
class Texts:
    """What the arms are run on. openings are continued; neutral texts must be left alone."""

    pairs: tuple[ContrastPair, ...]
    neutral: tuple[str, ...]
    openings: tuple[str, ...]
    words: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sampling:
    """How continuations are sampled; one noise for every arm."""

    samples: int = 2
    new_tokens: int = 40
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Return plain values; None for what is no number, which JSON cannot hold."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {key: value if math.isfinite(value) else None for key, value in values.items()}


@dataclass(frozen=True)
class Point:
    """What one arm does. Ratios are to the unsteered base; nats are per token; None: not measured.

    shift: mean over pairs of (log p(positive) − log p(negative)) per token, less the base's. accuracy:
    share of pairs whose positive completion is the likelier. target_share: of the words of sampled
    text; target_ratio is None where the base never writes one. fluency: perplexity of sampled text
    under the base. repetition: share of 3-grams that occurred before in their text. on_axis, opposite,
    neutral: perplexity of those texts under the arm. neutral_kl, rollout_kl: {mean, p95, p99}.
    """

    arm: Arm
    shift: Interval | None = None
    accuracy: Interval | None = None
    on_axis_ratio: Interval | None = None
    opposite_ratio: Interval | None = None
    neutral_ratio: Interval | None = None
    neutral_kl: Mapping[str, Interval] = field(default_factory=dict)
    target_share: Interval | None = None
    target_ratio: Interval | None = None
    fluency: Interval | None = None
    fluency_ratio: Interval | None = None
    repetition: Interval | None = None
    rollout_kl: Mapping[str, Interval] = field(default_factory=dict)
    score: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `report.json`."""
        values: dict[str, Any] = self.arm.to_dict()
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Interval):
                values[name] = value.to_dict()
            elif isinstance(value, Mapping):
                values[name] = {key: entry.to_dict() for key, entry in value.items()}
        return values


# What a stage measured: {arm's name: plain values}, ready for JSON.
Measurements = dict[str, dict[str, Any]]


def measure_pairs(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    arms: Sequence[Arm],
    pairs: Sequence[ContrastPair],
) -> Measurements:
    """Score both completions of every pair: {arm: {"positive" | "negative": [[nats, tokens], …]}}."""
    found: Measurements = {arm.name: {"positive": [], "negative": []} for arm in arms}
    for pair in track(pairs, "contrast pairs"):
        for side, whole in zip(("positive", "negative"), pair.texts(), strict=True):
            text = getattr(pair, side)
            for group, prefix in _by_instruction(arms):
                # A conversation is read as plain text: hooks and bake see the same either way.
                ids, start = _split(tokenizer, prefix + whole.removesuffix(text), text)
                for arm, logs in compare_arms(loaded, structure, group, ids, start):
                    nats = -float(_chosen(logs, ids)[start - 1 :].sum())
                    found[arm.name][side].append([nats, len(ids) - start])
    return found


def measure_neutral(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    arms: Sequence[Arm],
    texts: Sequence[str],
) -> Measurements:
    """Run neutral texts: {arm: {"nats": [per text], "tokens": […], "kl": [[per token] per text]}}.

    kl is KL(base ‖ arm) in nats. `arms` begins with the base. Arms that only a prompt distinguishes
    are left out: an instruction, and a push at a prompt's last token, do nothing to a text alone.
    Raises PromptError where no text has two tokens.
    """
    shared = [arm for arm in arms if not arm.instruction and arm.injection == "broadcast"]
    found: Measurements = {arm.name: {"nats": [], "tokens": [], "kl": []} for arm in shared}
    encoded = [text for text in encode(tokenizer, texts, NEUTRAL_TOKENS) if len(text.ids) > 1]
    if not encoded:
        raise PromptError("the neutral texts have no two tokens to predict; give longer ones")
    for text in track(encoded, "neutral texts"):
        reference: torch.Tensor | None = None
        for arm, logs in compare_arms(loaded, structure, shared, text.ids):
            reference = logs if reference is None else reference
            entry = found[arm.name]
            entry["nats"].append(-float(_chosen(logs, text.ids).sum()))
            entry["tokens"].append(len(text.ids) - 1)
            entry["kl"].append(_round(_divergence(reference, logs)))
    return found


def measure_rollouts(
    loaded: LoadedModel,
    structure: LayerStructure,
    tokenizer: Any,
    arms: Sequence[Arm],
    openings: Sequence[str],
    sampling: Sampling,
) -> Measurements:
    """Sample continuations of every opening under every arm, and score them under arm and base.

    Returns {arm: {"ids": [[…]], "nats": […], "kl": [[…]]}}, openings × samples entries each. nats are
    the base's; kl is KL(arm ‖ base) per sampled token.
    """
    found: Measurements = {arm.name: {"ids": [], "nats": [], "kl": []} for arm in arms}
    stop = getattr(tokenizer, "eos_token_id", None)
    for index, opening in enumerate(track(openings, "sampled text")):
        for group, prefix in _by_instruction(arms):
            prompt = _without_end(encode(tokenizer, [prefix + opening])[0].ids, stop)
            plain = _without_end(encode(tokenizer, [opening])[0].ids, stop)
            rows = [(arm, sample) for arm in group for sample in range(sampling.samples)]
            if not prompt:
                raise PromptError(f"the opening {opening!r} has no token to continue; write a word")
            width = len(prompt) + sampling.new_tokens
            step = rows_per_forward(loaded, width, cached=True)
            for start in range(0, len(rows), step):
                chunk = rows[start : start + step]
                drawn = _continue(loaded, structure, chunk, prompt, index, sampling)
                drawn = [_cut(tokens, stop) for tokens in drawn]
                scored = _score(loaded, structure, chunk, prompt, plain, drawn)
                for (arm, _), ids, (nats, kl) in zip(chunk, drawn, scored, strict=True):
                    found[arm.name]["ids"].append(list(ids))
                    found[arm.name]["nats"].append(nats)
                    found[arm.name]["kl"].append(kl)
    return found


def _by_instruction(arms: Sequence[Arm]) -> Iterable[tuple[list[Arm], str]]:
    """Group arms by the text that is put before every prompt, an instruction and a line break."""
    for text in dict.fromkeys(arm.instruction for arm in arms):
        yield [arm for arm in arms if arm.instruction == text], f"{text}\n" if text else ""


def _split(tokenizer: Any, prompt: str, completion: str) -> tuple[Tokens, int]:
    """Return the ids of prompt + completion and how many of them are the prompt's; at least one."""
    end = getattr(tokenizer, "eos_token_id", None)
    text = encode(tokenizer, [prompt + completion])[0]
    ids = _without_end(text.ids, end)
    if tokenizer.is_fast:
        start = sum(stop <= len(prompt) for _, stop in text.offsets[: len(ids)])
    else:
        start = len(_without_end(encode(tokenizer, [prompt])[0].ids, end))
    start = max(1, min(start, len(ids)))
    if start >= len(ids):
        raise PromptError(
            f"the completion {completion!r} has no token of its own; write a longer one"
        )
    return ids, start


def _chosen(logs: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Return log p of every token but the first, (positions − 1,)."""
    import torch

    targets = torch.tensor(list(ids[1:]), device=logs.device)
    return logs[: len(ids) - 1].gather(-1, targets[:, None])[:, 0].double()


def _divergence(left: torch.Tensor, right: torch.Tensor) -> list[float]:
    """Return KL(left ‖ right) in nats at every position, from log-probabilities."""
    values = (left.exp() * (left - right)).sum(-1).clamp(min=0)
    return [float(value) for value in values]


def _round(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _continue(
    loaded: LoadedModel,
    structure: LayerStructure,
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
    with steered_rows(loaded, structure, [arm for arm, _ in rows], len(prompt)):
        return [tuple(row) for row in decode(loaded, tokens, sampling.new_tokens, choose).tolist()]


def _score(
    loaded: LoadedModel,
    structure: LayerStructure,
    rows: Sequence[tuple[Arm, int]],
    prompt: Tokens,
    plain: Tokens,
    drawn: Sequence[Tokens],
) -> list[tuple[float, list[float]]]:
    """Return (nats under the base, KL(arm ‖ base) per token) of each row's continuation.

    The base never sees an instruction: its prompt is `plain`.
    """
    arms = [arm for arm, _ in rows]
    steered = _logs_after(loaded, structure, arms, prompt, drawn)
    base = _logs_after(loaded, structure, [Arm("base", "base")] * len(rows), plain, drawn)
    scored = []
    for ids, own, under in zip(drawn, steered, base, strict=True):
        nats = -sum(float(under[place, token]) for place, token in enumerate(ids))
        scored.append((nats, _round(_divergence(own, under))))
    return scored


def _logs_after(
    loaded: LoadedModel,
    structure: LayerStructure,
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
            steered_rows(loaded, structure, arms[start : start + step], len(prompt)),
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


def summarise(
    arms: Sequence[Arm],
    measured: Mapping[str, Measurements],
    tokenizer: Any,
    texts: Texts,
    sampling: Sampling,
    scorer: Scorer | None = None,
) -> tuple[Point, ...]:
    """Return every arm's figures with their intervals. `arms` begins with the base."""
    base = arms[0].name
    return tuple(
        _Figures(arm, base, measured, tokenizer, texts, sampling, scorer).point() for arm in arms
    )


class _Figures:
    """One arm's figures, from its measurements and the base's."""

    def __init__(
        self,
        arm: Arm,
        base: str,
        measured: Mapping[str, Measurements],
        tokenizer: Any,
        texts: Texts,
        sampling: Sampling,
        scorer: Scorer | None,
    ) -> None:
        self.arm = arm
        self.own = {stage: values.get(arm.name) for stage, values in measured.items()}
        self.base = {stage: values.get(base) for stage, values in measured.items()}
        self.tokenizer, self.texts, self.sampling, self.scorer = tokenizer, texts, sampling, scorer

    def point(self) -> Point:
        """Return all of them."""
        return Point(
            self.arm,
            **(self._pairs() if self.own.get("pairs") else {}),
            **(self._neutral() if self.own.get("neutral") else {}),
            **(self._rollouts() if self.own.get("rollouts") else {}),
        )

    def _pairs(self) -> dict[str, Any]:
        if not self._required("pairs")["positive"]:
            return {}
        return {
            "shift": self._shift(),
            "accuracy": self._accuracy(),
            "on_axis_ratio": self._perplexity_ratio("positive"),
            "opposite_ratio": self._perplexity_ratio("negative"),
        }

    def _neutral(self) -> dict[str, Any]:
        return {
            "neutral_ratio": self._neutral_ratio(),
            "neutral_kl": _percentiles(self._required("neutral")["kl"]),
        }

    def _required(self, stage: str, *, base: bool = False) -> dict[str, Any]:
        found = (self.base if base else self.own)[stage]
        assert found is not None
        return found

    def _gap(self, *, base: bool = False) -> np.ndarray:
        """Return log p(positive) − log p(negative) per token of every pair."""
        positive, negative = (
            _pairs_array(self._required("pairs", base=base)[side])
            for side in ("positive", "negative")
        )
        gap: np.ndarray = negative[:, 0] / negative[:, 1] - positive[:, 0] / positive[:, 1]
        return gap

    def _shift(self) -> Interval:
        moved = self._gap() - self._gap(base=True)
        return _interval(lambda rows: float(moved[rows].mean()), len(moved))

    def _accuracy(self) -> Interval:
        right = (self._gap() > 0).astype(float)
        return _interval(lambda rows: float(right[rows].mean()), len(right))

    def _perplexity_ratio(self, side: str) -> Interval:
        own = _pairs_array(self._required("pairs")[side])
        base = _pairs_array(self._required("pairs", base=True)[side])

        def ratio(rows: Any) -> float:
            return _exp(
                own[rows, 0].sum() / own[rows, 1].sum() - base[rows, 0].sum() / base[rows, 1].sum()
            )

        return _interval(ratio, len(own))

    def _neutral_ratio(self) -> Interval:
        import numpy as np

        own, base = self._required("neutral"), self._required("neutral", base=True)
        nats, reference = np.array(own["nats"]), np.array(base["nats"])
        tokens = np.array(own["tokens"])
        return _interval(
            lambda rows: _exp((nats[rows] - reference[rows]).sum() / tokens[rows].sum()), len(nats)
        )

    def _rollouts(self) -> dict[str, Any]:
        import numpy as np

        own, base = self._required("rollouts"), self._required("rollouts", base=True)
        samples = self.sampling.samples

        def per_opening(values: Iterable[float]) -> np.ndarray:
            array: np.ndarray = np.array(list(values), dtype=float)
            summed: np.ndarray = array.reshape(-1, samples).sum(axis=1)
            return summed

        def share(top: np.ndarray, bottom: np.ndarray) -> Callable[[Any], float]:
            return lambda rows: float(top[rows].sum() / max(bottom[rows].sum(), 1e-12))

        nats, tokens = per_opening(own["nats"]), per_opening(len(ids) for ids in own["ids"])
        base_nats = per_opening(base["nats"])
        base_tokens = per_opening(len(ids) for ids in base["ids"])
        count = len(nats)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in own["ids"]]
        repeats = [_repeats(ids) for ids in own["ids"]]
        found: dict[str, Any] = {
            "fluency": _interval(lambda rows: _exp(share(nats, tokens)(rows)), count),
            "fluency_ratio": _interval(
                lambda rows: _exp(share(nats, tokens)(rows) - share(base_nats, base_tokens)(rows)),
                count,
            ),
            "repetition": _interval(
                share(
                    per_opening(repeated for repeated, _ in repeats),
                    per_opening(total for _, total in repeats),
                ),
                count,
            ),
            "rollout_kl": _percentiles(own["kl"]),
        }
        if self.texts.words:
            found |= self._targets(texts, base, per_opening, share, count)
        if self.scorer is not None:
            scores = per_opening(self.scorer(text) for text in texts) / samples
            found["score"] = _interval(lambda rows: float(scores[rows].mean()), count)
        return found

    def _targets(
        self,
        texts: Sequence[str],
        base: Mapping[str, Any],
        per_opening: Callable[[Iterable[float]], np.ndarray],
        share: Callable[[np.ndarray, np.ndarray], Callable[[Any], float]],
        count: int,
    ) -> dict[str, Any]:
        def counted(texts: Sequence[str]) -> Callable[[Any], float]:
            pairs = [count_words(text, self.texts.words) for text in texts]
            return share(
                per_opening(targets for targets, _ in pairs),
                per_opening(words for _, words in pairs),
            )

        reference = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in base["ids"]]
        own_share, base_share = counted(texts), counted(reference)
        found: dict[str, Any] = {"target_share": _interval(own_share, count)}
        if base_share(slice(None)) > 0:
            found["target_ratio"] = _interval(
                lambda rows: own_share(rows) / max(base_share(rows), 1e-12), count
            )
        return found


def _interval(statistic: Callable[[Any], float], count: int) -> Interval:
    low, high = bootstrap_interval(statistic, count, draws=400)
    return Interval(float(statistic(slice(None))), low, high)


def _pairs_array(values: Sequence[Sequence[float]]) -> np.ndarray:
    import numpy as np

    return np.array(values, dtype=float)


def _exp(nats: float) -> float:
    """Return exp(nats), infinite where a float cannot hold it."""
    return math.exp(nats) if nats < 700 else math.inf


def _percentiles(kl: Sequence[Sequence[float]]) -> dict[str, Interval]:
    """Return mean, 95th and 99th percentile over all tokens, with intervals over texts."""
    import numpy as np

    texts = [np.array(text) for text in kl]
    together = [text for text in texts if len(text)]
    if not together:
        return {}

    def of(function: Callable[[np.ndarray], float]) -> Callable[[Any], float]:
        def statistic(rows: Any) -> float:
            chosen = together[rows] if isinstance(rows, slice) else [together[r] for r in rows]
            return float(function(np.concatenate(chosen)))

        return statistic

    return {
        "mean": _interval(of(np.mean), len(together)),
        "p95": _interval(of(lambda values: np.quantile(values, 0.95)), len(together)),
        "p99": _interval(of(lambda values: np.quantile(values, 0.99)), len(together)),
    }


def _repeats(ids: Sequence[int]) -> tuple[int, int]:
    """Return how many n-grams of a text occurred before in it, and how many there are."""
    grams = [tuple(ids[place : place + NGRAM]) for place in range(len(ids) - NGRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)
