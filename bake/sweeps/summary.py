"""From measurements to figures: what each arm does beside the base, with bootstrap intervals.

Intervals are over texts (pairs, neutral texts, openings), never over tokens: tokens of one text are not
independent. Arm and base are resampled together, so a ratio's interval is that of a paired comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bake.models.generation import bootstrap_interval, count_words, middle_of, resample
from bake.sweeps.arms import Arm
from bake.sweeps.judge import mean_scores
from bake.sweeps.measurements import Measurements, Sampling, Scorer, Texts
from bake.sweeps.points import Interval, Point
from bake.texts.protocols import Tokenizer

if TYPE_CHECKING:
    import numpy as np

NGRAM = 3
DRAWS = 400  # of a bootstrap


def summarise(
    arms: Sequence[Arm],
    measured: Mapping[str, Measurements],
    tokenizer: Tokenizer,
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
        tokenizer: Tokenizer,
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
            **(self._judged() if self.own.get("judge") else {}),
        )

    def _pairs(self) -> dict[str, Any]:
        if not self._required("pairs")["positive"]:
            return {}
        sign = -1 if self.arm.multiplier < 0 else 1
        moved = self._gap() - self._gap(base=True)
        gain = self._gain("positive" if sign > 0 else "negative")

        def net_shift(rows: Any) -> float:
            return float(sign * moved[rows].mean() + min(gain[rows].mean(), 0.0))

        return {
            "shift": self._over_prompts(lambda rows: float(moved[rows].mean())),
            "gain": self._over_prompts(lambda rows: float(gain[rows].mean())),
            "net_shift": self._over_prompts(net_shift),
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
        return pair_gaps(self._required("pairs", base=base))

    def _gain(self, side: str) -> np.ndarray:
        """Return by how much each pair's completion on a side became likelier than under the base."""
        own = _pairs_array(self._required("pairs")[side])
        base = _pairs_array(self._required("pairs", base=True)[side])
        gain: np.ndarray = base[:, 0] / base[:, 1] - own[:, 0] / own[:, 1]
        return gain

    def _accuracy(self) -> Interval:
        right = (self._gap() > 0).astype(float)
        return self._over_prompts(lambda rows: float(right[rows].mean()))

    def _over_prompts(self, statistic: Callable[[Any], float]) -> Interval:
        """Return a statistic of pairs; those that share a prompt are drawn together."""
        import numpy as np

        prompts: dict[Any, list[int]] = {}
        for row, pair in enumerate(self.texts.pairs):
            prompts.setdefault(pair.prompt or row, []).append(row)
        groups = [np.array(rows) for rows in prompts.values()]

        def of_groups(chosen: Any) -> float:
            if isinstance(chosen, slice):
                return statistic(chosen)
            return statistic(np.concatenate([groups[index] for index in chosen]))

        return _interval(of_groups, len(groups))

    def _perplexity_ratio(self, side: str) -> Interval:
        own = _pairs_array(self._required("pairs")[side])
        base = _pairs_array(self._required("pairs", base=True)[side])

        def ratio(rows: Any) -> float:
            return _exp(
                own[rows, 0].sum() / own[rows, 1].sum() - base[rows, 0].sum() / base[rows, 1].sum()
            )

        return self._over_prompts(ratio)

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
            def of(rows: Any) -> float:
                total = bottom[
                    rows
                ].sum()  # An arm that writes nothing has no figure: not 0, not 1.
                return float(top[rows].sum() / total) if total else math.nan

            return of

        nats, tokens = per_opening(own["nats"]), per_opening(len(ids) for ids in own["ids"])
        base_nats = per_opening(base["nats"])
        base_tokens = per_opening(len(ids) for ids in base["ids"])
        count = len(nats)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in own["ids"]]
        repeats = [count_repeats(ids) for ids in own["ids"]]
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

    def _judged(self) -> dict[str, Any]:
        """Return the judge's mean over openings; continuations without a number do not count."""
        import numpy as np

        scores = mean_scores(self._required("judge"))
        values = np.array([math.nan if score is None else score for score in scores])
        rows = values.reshape(-1, self.sampling.samples)
        openings = rows[~np.isnan(rows).all(axis=1)]
        if not len(openings):
            return {}
        means = np.nanmean(openings, axis=1)
        return {"judged": _interval(lambda chosen: float(means[chosen].mean()), len(means))}

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
                lambda rows: own_share(rows) / (base_share(rows) or math.nan), count
            )
        return found


def _interval(statistic: Callable[[Any], float], count: int) -> Interval:
    low, high = bootstrap_interval(statistic, count, draws=DRAWS)
    return Interval(float(statistic(slice(None))), low, high)


def pair_gaps(figures: Mapping[str, Sequence[Sequence[float]]]) -> np.ndarray:
    """Return log p(positive) − log p(negative) per token of every pair that an arm was measured on."""
    positive, negative = (_pairs_array(figures[side]) for side in ("positive", "negative"))
    gap: np.ndarray = negative[:, 0] / negative[:, 1] - positive[:, 0] / positive[:, 1]
    return gap


def _pairs_array(values: Sequence[Sequence[float]]) -> np.ndarray:
    import numpy as np

    return np.array(values, dtype=float)


def _exp(nats: float) -> float:
    """Return exp(nats), infinite where a float cannot hold it."""
    return math.inf if nats >= 700 else math.exp(nats)


def _percentiles(kl: Sequence[Sequence[float]]) -> dict[str, Interval]:
    """Return mean, 95th and 99th percentile over all tokens, with intervals over texts."""
    import numpy as np

    texts = [np.array(text) for text in kl if len(text)]
    if not texts:
        return {}

    def figures(chosen: Sequence[np.ndarray]) -> tuple[float, ...]:
        together = np.concatenate(chosen)
        return (float(together.mean()), *map(float, np.quantile(together, [0.95, 0.99])))

    drawn = [figures([texts[row] for row in rows]) for rows in resample(len(texts), DRAWS)]
    names = ("mean", "p95", "p99")
    return {
        name: Interval(value, *middle_of([draw[place] for draw in drawn]))
        for place, (name, value) in enumerate(zip(names, figures(texts), strict=True))
    }


def count_repeats(ids: Sequence[int]) -> tuple[int, int]:
    """Return how many n-grams of a text occurred before in it, and how many there are."""
    grams = [tuple(ids[place : place + NGRAM]) for place in range(len(ids) - NGRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)
