"""Sampling: paired noise, the right distribution, and counts, scores and intervals by hand."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from bake.errors import PromptError
from bake.models import forward
from bake.models.forward import LoadedModel, continue_greedily, find_cache, load_model
from bake.models.generation import (
    bootstrap_interval,
    count_words,
    sample_continuations,
    score_continuations,
)
from bake.texts.prompts import read_words

PROBABILITIES = torch.tensor([0.05, 0.1, 0.2, 0.25, 0.4])
PROMPTS = [(1, 50, 60), (1, 70), (1, 80, 90, 100), (1, 55, 66)]


class FixedLogits(nn.Module):
    """A language model that gives the same logits everywhere, whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.fixed, self.forwards = logits, 0
        self.config = PreTrainedConfig()  # It names no number of positions.

    def forward(self, tokens, past_key_values=None, use_cache=True):
        self.forwards += 1
        logits = self.fixed.expand(*tokens.shape, len(self.fixed))
        return ModelOutput(logits=logits, past_key_values=past_key_values)


def toy(logits=None):
    model = FixedLogits(PROBABILITIES.log() if logits is None else logits)
    return LoadedModel(model, {}, torch.device("cpu"))


def draw(loaded=None, prompts=PROMPTS, **options):
    return sample_continuations(loaded or toy(), prompts, **{"new_tokens": 6, **options})


def chi_square(counts, probabilities):
    total = sum(counts.values())
    return sum(
        (counts[token] - total * p) ** 2 / (total * p)
        for token, p in enumerate(probabilities.tolist())
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_the_distribution_of_the_softmax(temperature):
    drawn = draw(prompts=[(1,)], samples=500, new_tokens=8, temperature=temperature)
    counts = Counter(token for tokens in drawn for token in tokens)
    expected = (PROBABILITIES.log() / temperature).softmax(-1)
    # Four degrees of freedom: 23.5 is passed once in ten thousand seeds, and the seed is fixed.
    assert chi_square(counts, expected) < 23.5
    other = (PROBABILITIES.log() / (3 - temperature)).softmax(-1)
    assert chi_square(counts, other) > 100


@pytest.mark.parametrize("dimension", ["samples", "steps", "prompts"])
def test_draws_do_not_repeat(dimension):
    sizes = {"samples": 1, "steps": 1, "prompts": 1} | {dimension: 200}
    drawn = draw(
        prompts=[(1,)] * sizes["prompts"], samples=sizes["samples"], new_tokens=sizes["steps"]
    )
    tokens = [token for row in drawn for token in row]
    assert len(tokens) == 200
    assert chi_square(Counter(tokens), PROBABILITIES) < 23.5
    followed = Counter(pairwise(tokens))
    assert followed[4, 4] < 60  # 0.16 of 199 is 32; a constant or a period would show.


def test_small_temperature_takes_the_likeliest():
    assert draw(temperature=1e-3) == [(4,) * 6] * 4


def test_seed_decides_the_draw():
    assert draw(seed=3) == draw(seed=3)
    assert draw(seed=3) != draw(seed=4)


def test_samples_come_prompt_by_prompt():
    drawn = draw(samples=3)
    assert len(drawn) == 12
    assert all(len(tokens) == 6 for tokens in drawn)
    # A prompt's first sample is the only one that a single sample would give.
    assert drawn[0::3] == draw(samples=1)
    assert len(set(drawn)) == 12


def test_row_is_the_same_whatever_the_other_rows_are(open_tiny):
    loaded = open_tiny("llama").loaded
    together = draw(loaded, samples=2)
    assert len(set(together)) == 8
    others = [PROMPTS[0], (1, 5), (1, 6), PROMPTS[3], (1, 7, 8, 9, 10)]
    mixed = draw(loaded, others, samples=2)
    assert mixed[0:2] == together[0:2]
    assert mixed[6:8] == together[6:8]
    assert mixed[2:6] != together[2:6]
    assert draw(loaded, PROMPTS[:1], samples=2) == together[:2]


def test_rows_in_several_forwards_are_the_same(monkeypatch):
    expected = draw(samples=5)
    few, many = toy(), toy()
    assert draw(few, samples=5) == expected
    monkeypatch.setattr("bake.models.generation.ROWS", 2)
    assert draw(many, samples=5) == expected
    assert many.model.forwards > few.model.forwards


def test_models_that_are_compared_share_their_noise():
    logits = PROBABILITIES.log()
    near = draw(toy(logits + torch.tensor([0, 0, 0, 0, 1e-3])), samples=50)
    same = np.mean([a == b for a, b in zip(near, draw(samples=50), strict=True)])
    independent = np.mean([a == b for a, b in zip(near, draw(samples=50, seed=1), strict=True)])
    assert same > 0.95
    assert independent < 0.1


def test_cache_changes_nothing(open_tiny):
    """At a small temperature sampling is greedy, which transformers' own generate can check."""
    loaded = open_tiny("llama").loaded
    greedy = [tuple(tokens) for tokens in continue_greedily(loaded, PROMPTS, 6)]
    assert len(set(greedy)) > 1
    assert draw(loaded, temperature=1e-4) == greedy


def test_continuation_is_cut_at_the_stop_token():
    whole = draw(samples=20)
    cut = draw(samples=20, stop_token=4)
    for full, short in zip(whole, cut, strict=True):
        expected = full[: full.index(4)] if 4 in full else full
        assert short == expected
    assert len({len(tokens) for tokens in cut}) > 3
    assert draw(samples=20, stop_token=99) == whole


def test_score_equals_an_independent_cross_entropy(open_tiny):
    loaded = open_tiny("llama").loaded
    continuations = [(7, 8, 9), (10,), (), (11, 12)]
    scores = score_continuations(loaded, PROMPTS, continuations)
    for prompt, continuation, score in zip(PROMPTS, continuations, scores, strict=True):
        expected = 0.0
        for place, token in enumerate(continuation):
            ids = torch.tensor([prompt + continuation[:place]])
            with torch.no_grad():
                logits = loaded.model(ids).logits[0, -1].double()
            expected -= (logits[token] - logits.logsumexp(0)).item()
        assert score == pytest.approx(expected, rel=1e-5)
    assert scores[2] == 0
    assert min(scores[0], scores[1], scores[3]) > 0.1


def test_score_of_known_probabilities():
    loaded = LoadedModel(FixedForScoring(PROBABILITIES.log()), {}, torch.device("cpu"))
    (score,) = score_continuations(loaded, [(1,)], [(4, 0, 2)])
    assert score == pytest.approx(-math.log(0.4 * 0.05 * 0.2), rel=1e-6)


class FixedForScoring(FixedLogits):
    def forward(self, tokens, use_cache=False):
        return super().forward(tokens)


def test_words_are_counted_whole_and_in_any_case():
    targets = frozenset({"happy", "sun", "don't"})
    assert count_words("Happy, HAPPY: unhappy sun-lit sunny.", targets) == (3, 6)
    assert count_words("I don't mind 25 suns_sun!", targets) == (2, 5)
    assert count_words("", targets) == (0, 0)
    assert count_words("42 -- !", targets) == (0, 0)
    assert count_words("Über Füße", frozenset({"füße"})) == (1, 2)


def test_words_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# a comment\nHappy\n\n  glad  # more\nhappy\n", encoding="utf-8")
    assert read_words(path) == {"happy", "glad"}


def test_words_file_without_words_is_refused(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# nothing\n\n", encoding="utf-8")
    with pytest.raises(PromptError, match="holds no words"):
        read_words(path)


def test_interval_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    low, high = bootstrap_interval(lambda indices: float(values[indices].mean()), 400)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    narrow = bootstrap_interval(lambda i: float(values[i].mean()), 400, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_interval_is_the_same_every_time_and_of_a_constant_a_point():
    values = np.arange(30.0)

    def mean(indices):
        return float(values[indices].mean())

    assert bootstrap_interval(mean, 30) == bootstrap_interval(mean, 30)
    assert bootstrap_interval(mean, 30) != bootstrap_interval(mean, 30, seed=1)
    assert bootstrap_interval(lambda _indices: 3.0, 30) == (3.0, 3.0)


def test_interval_leaves_out_draws_that_are_not_finite():
    drawn = iter([math.nan, math.inf, *np.linspace(0, 1, 98).tolist()])
    low, high = bootstrap_interval(lambda _indices: next(drawn), 5, draws=100)
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_a_continuation_beyond_the_models_positions_is_refused():
    loaded = toy()
    loaded.model.config.max_position_embeddings = 6
    assert len(sample_continuations(loaded, [(1, 2)], new_tokens=4)[0]) == 4
    with pytest.raises(PromptError, match="2 tokens and 5 new ones do not fit the model's 6 posi"):
        sample_continuations(loaded, [(1, 2)], new_tokens=5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_the_name_that_transformers_gives_it(name):
    assert find_cache({"logits": 1, name: "kept"}) == {name: "kept"}
    assert find_cache({"logits": 1, name: None}) == {}


def test_with_a_cache_the_same_tokens_are_written_as_without(llama, monkeypatch):
    loaded, prompts = load_model(llama), [(1, 5, 9, 7), (1, 6, 8, 3)]
    seen = []
    monkeypatch.setattr(forward, "find_cache", lambda output: seen.append(find_cache(output)) or {})
    without = continue_greedily(loaded, prompts, 6)
    assert all(seen)  # The model has one.
    monkeypatch.undo()
    assert continue_greedily(loaded, prompts, 6) == without
    assert continue_greedily(loaded, [(1, 5, 9, 8), (1, 6, 8, 4)], 6) != without
