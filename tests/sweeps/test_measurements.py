"""What one arm does: every figure against a computation by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import HIDDEN, byte_tokenizer

from bake.errors import PromptError
from bake.models.generation import score_continuations
from bake.sweeps.arms import Arm
from bake.sweeps.measurements import (
    Sampling,
    Texts,
    _split,
    measure_neutral,
    measure_pairs,
    measure_rollouts,
)
from bake.sweeps.points import Interval, Point
from bake.sweeps.summary import count_repeats, summarise
from bake.sweeps.window import Bounds, find_windows
from bake.texts.pairs import ContrastPair

PAIRS = (
    ContrastPair("The day was ", "bright and kind", "grey and cold"),
    ContrastPair("We found it ", "warm", "damp and dark"),
    ContrastPair("", "Good morning!", "Leave me."),
)
NEUTRAL = ("Water boils at one hundred degrees.", "He walked to the station.")
SAMPLING = Sampling(samples=2, new_tokens=6)
PUSH = {2: torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))}
ARMS = [Arm("base", "base"), Arm("m=+1", "direction", 1.0, push=PUSH)]


@pytest.fixture(scope="module")
def tiny(open_tiny):
    return open_tiny("llama")


@pytest.fixture(scope="module")
def given(tiny):
    return tiny.loaded


@pytest.fixture(scope="module")
def measured(given):
    return {
        "pairs": measure_pairs(given, ARMS, PAIRS),
        "neutral": measure_neutral(given, ARMS, NEUTRAL),
        "rollouts": measure_rollouts(given, ARMS, ["The market ", "A day"], SAMPLING),
    }


@pytest.fixture(scope="module")
def points(tiny, measured):
    texts = Texts(PAIRS, NEUTRAL, ("The market ", "A day"))
    return summarise(ARMS, measured, tiny.tokenizer, texts, SAMPLING)


def logs(tiny, ids, push=None):
    with torch.no_grad(), tiny.loaded.steered("mlp_out", push or {}):
        output = tiny.loaded.model(torch.tensor([list(ids)]), use_cache=False)
    return output.logits[0].log_softmax(-1)


def per_token(tiny, prompt, text, push=None):
    """Mean log-likelihood of a completion's tokens; a byte-level tokenizer with one token in front."""
    ids = tiny.tokenizer(prompt + text)["input_ids"]
    start = 1 + len(prompt)
    found = logs(tiny, ids, push)
    return sum(float(found[place - 1, ids[place]]) for place in range(start, len(ids))) / len(text)


def test_shift_and_accuracy(tiny, points):
    gaps = {
        name: [
            per_token(tiny, p.prompt, p.positive, push)
            - per_token(tiny, p.prompt, p.negative, push)
            for p in PAIRS
        ]
        for name, push in (("base", None), ("m=+1", PUSH))
    }
    moved = [own - base for own, base in zip(gaps["m=+1"], gaps["base"], strict=True)]
    assert max(map(abs, moved)) > 0.01
    base, own = points
    assert own.shift.value == pytest.approx(sum(moved) / 3, abs=1e-5)
    assert own.shift.low <= own.shift.value <= own.shift.high
    assert own.accuracy.value == pytest.approx(sum(gap > 0 for gap in gaps["m=+1"]) / 3)
    assert (base.shift.value, base.shift.low, base.shift.high) == (0, 0, 0)


def test_neutral_text_its_perplexity_and_divergence(tiny, points):
    nats, tokens, divergence = 0.0, 0, []
    for text in NEUTRAL:
        ids = tiny.tokenizer(text)["input_ids"]
        base, own = logs(tiny, ids), logs(tiny, ids, PUSH)
        nats += sum(float(base[i, t] - own[i, t]) for i, t in enumerate(ids[1:]))
        tokens += len(ids) - 1
        divergence += (base.exp() * (base - own)).sum(-1).tolist()
    assert abs(nats / tokens) > 1e-3
    found = points[1]
    assert found.neutral_ratio.value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found.neutral_kl["mean"].value == pytest.approx(
        sum(divergence) / len(divergence), rel=1e-3
    )
    assert found.neutral_kl["mean"].value < found.neutral_kl["p95"].value
    assert found.neutral_kl["p95"].value <= found.neutral_kl["p99"].value
    assert points[0].neutral_ratio.value == 1
    assert points[0].neutral_kl["p99"].value == 0


def test_sampled_text_is_scored_by_the_base(tiny, measured, points):
    prompts = [tuple(tiny.tokenizer(t)["input_ids"]) for t in ("The market ", "A day")]
    for arm, point in zip(ARMS, points, strict=True):
        drawn = [tuple(ids) for ids in measured["rollouts"][arm.name]["ids"]]
        nats = score_continuations(tiny.loaded, [prompts[0]] * 2 + [prompts[1]] * 2, drawn)
        expected = math.exp(sum(nats) / sum(map(len, drawn)))
        assert point.fluency.value == pytest.approx(expected, rel=1e-4)
    assert measured["rollouts"]["base"]["ids"] != measured["rollouts"]["m=+1"]["ids"]
    assert points[0].fluency_ratio.value == 1
    assert points[1].fluency_ratio.value == pytest.approx(
        points[1].fluency.value / points[0].fluency.value
    )
    assert points[0].rollout_kl["mean"].value < 1e-6 < points[1].rollout_kl["mean"].value


def test_words_and_a_scorer_are_counted_in_the_sampled_text(tiny, measured):
    rollouts = {name: {**values} for name, values in measured["rollouts"].items()}
    encode = lambda text: tiny.tokenizer(text)["input_ids"][1:]  # noqa: E731
    rollouts["base"]["ids"] = [encode(t) for t in ("good bad", "bad bad", "good", "bad")]
    rollouts["m=+1"]["ids"] = [encode(t) for t in ("good good", "Good!", "good", "bad")]
    texts = Texts(PAIRS, NEUTRAL, ("a", "b"), frozenset({"good"}))
    base, own = summarise(
        ARMS, {"rollouts": rollouts}, tiny.tokenizer, texts, SAMPLING, lambda text: len(text)
    )
    assert base.target_share.value == pytest.approx(2 / 6)
    assert own.target_share.value == pytest.approx(4 / 5)
    assert own.target_ratio.value == pytest.approx(2.4)
    assert own.score.value == pytest.approx((9 + 5 + 4 + 3) / 4)
    assert own.shift is None  # Nothing was measured on pairs.
    assert own.neutral_kl == {}


def test_no_ratio_where_the_base_never_writes_a_target_word(tiny, measured):
    texts = Texts(PAIRS, NEUTRAL, ("a", "b"), frozenset({"zzzzzz"}))
    base, own = summarise(ARMS, measured, tiny.tokenizer, texts, SAMPLING)
    assert base.target_share.value == 0
    assert own.target_ratio is None


def test_arms_that_only_a_prompt_distinguishes_have_no_neutral_figures(given, tiny):
    last = Arm("last", "direction", 1.0, push=PUSH, injection="last-token")
    asked = Arm("instruction", "prompt", instruction="Be kind.")
    arms = [*ARMS, last, asked]
    neutral = measure_neutral(given, arms, NEUTRAL)
    assert set(neutral) == {"base", "m=+1"}
    measured = {"pairs": measure_pairs(given, arms, PAIRS), "neutral": neutral}
    points = summarise(arms, measured, tiny.tokenizer, Texts(PAIRS, NEUTRAL, ()), SAMPLING)
    assert [point.arm.name for point in points] == ["base", "m=+1", "last", "instruction"]
    assert points[2].neutral_ratio is None
    assert points[1].shift.value != points[2].shift.value
    assert abs(points[3].shift.value) > 1e-3


def test_an_instruction_stands_before_the_prompt_on_a_line_of_its_own(given, tiny):
    asked = Arm("instruction", "prompt", instruction="Be kind.")
    found = measure_pairs(given, [ARMS[0], asked], PAIRS[:1])
    nats, tokens = found["instruction"]["positive"][0]
    expected = per_token(tiny, "Be kind.\nThe day was ", "bright and kind")
    assert -nats / tokens == pytest.approx(expected, abs=1e-5)
    assert nats != pytest.approx(found["base"]["positive"][0][0], abs=1e-3)


def test_a_conversation_is_scored_as_one(tiny):
    """As what a direction is found from: the template's words, the reply, and nothing after it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    loaded = replace(tiny.loaded, tokenizer=tokenizer)
    asked = ({"role": "user", "content": "How was it?"},)
    pairs = [
        ContrastPair("How was it?", "lovely", "awful"),
        ContrastPair("", "lovely", "awful", (asked, asked)),
    ]
    arms = [*ARMS, Arm("instruction", "prompt", instruction="Be kind.")]
    found = measure_pairs(loaded, arms, pairs)
    for name, opening, push in (
        ("base", "", None),
        ("m=+1", "", PUSH),
        ("instruction", "Be kind.\n", None),
    ):
        ids = tokenizer(
            f"<s>[user]{opening}How was it?</s>[assistant]lovely", add_special_tokens=False
        )["input_ids"]
        start = len(ids) - len("lovely")
        by_hand = -sum(
            float(logs(tiny, ids, push)[place - 1, ids[place]]) for place in range(start, len(ids))
        )
        for nats, tokens in found[name]["positive"]:
            assert nats == pytest.approx(by_hand, rel=1e-5)
            assert tokens == len("lovely")
    plain = measure_pairs(loaded, arms, pairs[:1], chat_template="never")
    assert plain["base"]["positive"][0][0] != pytest.approx(
        found["base"]["positive"][0][0], rel=1e-3
    )
    with pytest.raises(PromptError, match="no chat template is applied"):
        measure_pairs(loaded, arms, pairs, chat_template="never")


class Tokenizer:
    """The byte-level tokenizer as a slow one, with an end token where it is asked for."""

    is_fast = False

    def __init__(self, inner, end):
        self.inner, self.end = inner, end
        self.eos_token_id = 2 if end else None

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, texts, **options):
        options.pop("return_offsets_mapping")
        rows = self.inner(texts, **options)["input_ids"]
        return {"input_ids": [[*ids, 2] if self.end else ids for ids in rows]}


@pytest.mark.parametrize("end", [False, True])
def test_a_completion_begins_alike_for_slow_tokenizers_with_and_without_an_end(tiny, end):
    expected = _split(tiny.tokenizer, "The day ", "was")
    assert expected[1] == 9
    assert len(expected[0]) == 12
    assert _split(Tokenizer(tiny.tokenizer, end), "The day ", "was") == expected


def test_a_completion_without_a_token_is_refused(tiny):
    with pytest.raises(PromptError, match="has no token of its own"):
        _split(tiny.tokenizer, "The day", "")


def test_texts_without_tokens_are_refused(given, tiny):
    with pytest.raises(PromptError, match="neutral texts have no two tokens"):
        measure_neutral(given, ARMS, [""])
    bare = type(
        "Bare",
        (Tokenizer,),
        {"__call__": lambda self, texts, **_: {"input_ids": [[] for _ in texts]}},
    )
    with pytest.raises(PromptError, match="opening '' has no token"):
        measure_rollouts(
            replace(tiny.loaded, tokenizer=bare(tiny.tokenizer, False)), ARMS, [""], SAMPLING
        )


def test_repeated_grams():
    assert count_repeats([1, 2, 3, 4]) == (0, 2)
    assert count_repeats([1, 2, 3, 1, 2, 3]) == (1, 4)
    assert count_repeats([5, 5, 5, 5, 5]) == (2, 3)
    assert count_repeats([1, 2]) == (0, 0)


def test_what_is_no_number_is_null_in_json():
    point = Point(ARMS[0], fluency=Interval(math.inf, 1.0, math.nan))
    text = json.dumps(point.to_dict(), allow_nan=False)
    assert json.loads(text)["fluency"] == {"value": None, "low": 1.0, "high": None}
    assert "shift" not in json.loads(text)


def test_an_arm_that_writes_nothing_has_no_fluency_and_no_words(tiny, measured):
    """It is outside every window: a bound on perplexity must not be passed by silence."""
    rollouts = {name: {**values} for name, values in measured["rollouts"].items()}
    rollouts["m=+1"] = {"ids": [[]] * 4, "nats": [0.0] * 4, "kl": [[]] * 4}
    texts = Texts(PAIRS, NEUTRAL, ("a", "b"), frozenset({"good"}))
    _, own = summarise(ARMS, {"rollouts": rollouts}, tiny.tokenizer, texts, SAMPLING)
    assert math.isnan(own.fluency_ratio.value)
    assert own.to_dict()["fluency"]["value"] is None
    assert own.rollout_kl == {}
    (window,) = find_windows([own], Bounds())
    assert window.largest is None


def test_texts_beyond_the_models_positions_are_named(given, tiny):
    limit = tiny.loaded.model.config.max_position_embeddings
    long = "a" * (limit + 1)
    with pytest.raises(PromptError, match=f"the pair 'aaa.*and the model has {limit}"):
        measure_pairs(given, ARMS, [ContrastPair(long, "b", "c")])
    with pytest.raises(PromptError, match="the opening with its continuation 'aaa"):
        measure_rollouts(given, ARMS, ["a" * (limit - 3)], SAMPLING)
    # Of neutral text the beginning will do.
    found = measure_neutral(given, ARMS, [long])
    assert found["base"]["tokens"] == [min(limit, 256) - 1]


def test_pairs_that_share_a_prompt_are_resampled_together(tiny):
    """Ten copies of a prompt are no ten measurements: the interval is that of three prompts."""
    generator = np.random.default_rng(0)
    moved = {prompt: float(generator.normal()) for prompt in "abc"}
    nats = lambda value: [[value, 1]]  # noqa: E731

    def interval(copies):
        pairs = [ContrastPair(prompt, "x", "y") for prompt in "abc" for _ in range(copies)]
        rows = [moved[pair.prompt] for pair in pairs]
        measured = {
            "base": {"positive": nats(0.0) * len(rows), "negative": nats(0.0) * len(rows)},
            "m=+1": {"positive": [[-v, 1] for v in rows], "negative": nats(0.0) * len(rows)},
        }
        texts = Texts(tuple(pairs), (), ())
        return summarise(ARMS, {"pairs": measured}, tiny.tokenizer, texts, SAMPLING)[1].shift

    one, ten = interval(1), interval(10)
    assert one.high - one.low > 0.5
    assert (ten.value, ten.low, ten.high) == pytest.approx((one.value, one.low, one.high))
