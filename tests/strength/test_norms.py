"""Norms: μ against a plain implementation, what counts as content, and what must not matter."""

import math

import numpy as np
import pytest
import torch
from conftest import HIDDEN, LAYERS, PROMPTS, read_site

from bake.errors import BakeError, PromptError
from bake.sites import SITES
from bake.strength.norms import (
    ActivationNorms,
    LayerNorms,
    collect_token_norms,
    measure_norms,
    summarise,
)
from bake.texts.prompts import encode, make_batches

ALL_LAYERS = list(range(LAYERS))
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def measure(tiny, site="mlp_out", layers=(1, 3), texts=PROMPTS, statistic="mean", **batching):
    batches = make_batches(encode(tiny.tokenizer, texts), **batching)
    return measure_norms(tiny.loaded, site, batches, list(layers), statistic=statistic)


def plain_norms(tiny, site, layer, texts=PROMPTS, first=1):
    """Norms of every token from position `first` on, one unpadded text at a time, in float64."""
    activations = [
        read_site(tiny, site, layer, tiny.tokenizer(text)["input_ids"])[first:] for text in texts
    ]
    return torch.cat(activations).double().norm(dim=1)


def plant(tiny, layer, tokens, factor=1000.0):
    """Make the output of a decoder layer `factor` times as long at the given token ids."""
    model, seen = tiny.loaded.model, []
    handles = [
        model.register_forward_pre_hook(
            lambda _module, _arguments, keywords: seen.append(keywords["input_ids"]),
            with_kwargs=True,
        )
    ]

    def scale(_module, _arguments, output):
        planted = torch.isin(seen[-1], torch.tensor(tokens))
        return torch.where(planted.unsqueeze(-1), output * factor, output)

    handles.append(tiny.loaded.layer(layer).register_forward_hook(scale))
    return handles


@BOTH
@pytest.mark.parametrize("site", SITES)
def test_norms_equal_a_plain_implementation(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    found = measure(tiny, site, ALL_LAYERS)
    assert (found.site, found.hidden_size, found.prompts) == (site, HIDDEN, len(PROMPTS))
    for entry in found.layers:
        expected = plain_norms(tiny, site, entry.layer)
        assert entry.mean == pytest.approx(expected.mean().item(), rel=1e-5)
        assert entry.median == pytest.approx(float(np.median(expected)), rel=1e-5)
        assert entry.spread == pytest.approx(expected.std(correction=0).item(), rel=1e-4)
        assert (entry.tokens, entry.dropped) == (len(expected), 0)
    assert len({round(entry.mean, 3) for entry in found.layers}) == LAYERS


def test_last_layer_is_measured_before_the_final_norm(load_tiny):
    tiny = load_tiny("llama")  # transformers leaves hooks on a model that gave hidden states.
    ids = torch.tensor([tiny.tokenizer(PROMPTS[0])["input_ids"]])
    with torch.no_grad():
        states = tiny.loaded.model(ids, output_hidden_states=True).hidden_states
    (middle, last) = measure(tiny, layers=[2, LAYERS - 1], texts=PROMPTS[:1]).layers
    assert middle.mean == pytest.approx(states[3][0, 1:].norm(dim=1).mean().item(), rel=1e-5)
    normalised = states[-1][0, 1:].norm(dim=1).mean().item()
    assert abs(normalised / last.mean - 1) > 0.1


@BOTH
@pytest.mark.parametrize("site", ["mlp_out", "attn_in"])
def test_batches_padding_and_order_do_not_matter(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    expected = measure(tiny, site).values()
    ways = [
        {"batch_tokens": 1},
        {"batch_tokens": 100},
        {"padding_side": "left"},
        {"padding_side": "left", "batch_tokens": 150},
        {"texts": PROMPTS[::-1], "batch_tokens": 150},
    ]
    for way in ways:
        assert measure(tiny, site, **way).values() == pytest.approx(expected, rel=1e-5), way


def test_the_batches_compared_really_are_padded(open_tiny):
    encoded = encode(open_tiny("llama").tokenizer, PROMPTS)
    counts = [len(make_batches(encoded, batch_tokens=n)) for n in (1, 150, 4096)]
    assert counts[0] == 4
    assert counts[1] < 4
    assert counts[2] == 1
    assert (make_batches(encoded)[0].attention_mask == 0).sum() > 50


def test_left_padding_without_position_ids_would_shift_learned_positions(load_tiny):
    tiny = load_tiny("gpt2")
    (batch,) = make_batches(encode(tiny.tokenizer, PROMPTS), padding_side="left")
    inputs = batch.inputs()

    def mean(**given):
        with torch.no_grad():
            states = tiny.loaded.model(**given, output_hidden_states=True).hidden_states[4]
        return states[batch.content_mask].norm(dim=1).mean().item()

    right = measure(tiny, layers=[3]).layers[0].mean
    assert mean(**inputs) == pytest.approx(right, rel=1e-5)
    del inputs["position_ids"]
    assert abs(mean(**inputs) / right - 1) > 1e-3


def test_massive_activation_at_the_first_position_does_not_count(load_tiny):
    tiny = load_tiny("llama")
    before = measure(tiny)
    plant(tiny, 3, [tiny.tokenizer.bos_token_id])
    naive = plain_norms(tiny, "mlp_out", 3, first=0).mean().item()
    assert naive > 10 * before.layers[1].mean
    assert measure(tiny) == before
    assert measure(tiny, padding_side="left", batch_tokens=150).values() == pytest.approx(
        before.values(), rel=1e-5
    )


def test_massive_embedding_of_the_first_token_does_not_count(load_tiny):
    tiny = load_tiny("llama")
    before = measure(tiny, layers=[0]).layers[0].mean
    with torch.no_grad():
        tiny.loaded.model.model.embed_tokens.weight[tiny.tokenizer.bos_token_id] *= 10_000
    naive = plain_norms(tiny, "mlp_out", 0, first=0).mean().item()
    after = measure(tiny, layers=[0]).layers[0]
    assert naive > 10 * after.mean
    # Other tokens attend to the first one, so a little of the change is theirs.
    assert after.mean == pytest.approx(before, rel=0.02)
    assert after.mean == pytest.approx(plain_norms(tiny, "mlp_out", 0).mean().item(), rel=1e-5)
    assert after.dropped == 0


def test_special_tokens_inside_a_text_do_not_count(load_tiny):
    tiny = load_tiny("llama")
    texts = ["one</s>two", "three<pad>four"]
    plant(tiny, 3, [0, 2])
    (entry,) = measure(tiny, layers=[3], texts=texts).layers
    assert (entry.tokens, entry.dropped) == (len("onetwothreefour"), 0)
    # Counted, the planted tokens would have been dropped as outliers: show that they are massive.
    everything = plain_norms(tiny, "mlp_out", 3, texts)
    assert (everything > 100 * entry.median).sum() == 2


def test_padding_does_not_count(open_tiny):
    entry = measure(open_tiny("llama"), layers=[2]).layers[0]
    assert entry.tokens == sum(len(text) for text in PROMPTS)


def test_massive_content_tokens_are_dropped_and_counted(load_tiny):
    tiny = load_tiny("llama")
    texts = ["water and wind, and a house by the sea", "q", "Zebra"]
    expected = plain_norms(tiny, "mlp_out", 3, texts)
    kept = [char not in "qZ" for text in texts for char in text]
    plant(tiny, 3, tiny.tokenizer.convert_tokens_to_ids(["q", "Z"]))
    found = measure(tiny, layers=[2, 3], texts=texts)
    below, planted = found.layers
    assert (below.tokens, below.dropped) == (44, 0)
    assert (planted.tokens, planted.dropped) == (42, 2)
    assert planted.mean == pytest.approx(expected[torch.tensor(kept)].mean().item(), rel=1e-5)
    assert found.dropped_share == pytest.approx(2 / 88)


SPREAD = [
    8.0,
    9.0,
    10.0,
    11.0,
    12.0,
]  # median 10, median absolute deviation 1, or 1.4826 deviations


@pytest.mark.parametrize(
    ("others", "bound"),
    [
        (SPREAD, 10 + 10 * 1.4826),  # far outside the spread of the others
        ([1.0] * 9, 2.0),  # without a spread
        ([9.9, 10.0, 10.1], 20.0),  # a narrow spread: norms of normalised inputs
        ([1.0, 4.0, 10.0, 16.0, 19.0], 10 + 10 * 1.4826 * 6),  # a wide one
        ([0.1, 1.0, 10.0, 30.0, 40.0], 100.0),  # so wide that ten times the median is below it
    ],
)
def test_a_token_is_massive_above_a_bound(others, bound):
    # Pairs of the same value on both sides of the median leave it, and the deviation, where they were.
    crowd = np.array(others * 50)
    at_the_edge = summarise(0, np.append(crowd, bound * 0.999))
    assert (at_the_edge.tokens, at_the_edge.dropped) == (len(crowd) + 1, 0)
    beyond = summarise(0, np.append(crowd, bound * 1.001))
    assert (beyond.tokens, beyond.dropped) == (len(crowd), 1)
    assert beyond.mean == pytest.approx(crowd.mean())


def test_a_crowd_of_massive_tokens_is_dropped_though_none_is_ten_times_the_median():
    """As in a real model's layer 4: one token in twenty at 4 to 9 times the median."""
    generator = np.random.default_rng(0)
    usual, massive = generator.normal(90, 13, 2600), generator.uniform(360, 800, 170)
    assert np.concatenate([usual, massive]).mean() > 1.25 * usual.mean()
    found = summarise(4, np.concatenate([usual, massive]))
    assert (found.tokens, found.dropped) == (2600, 170)
    assert found.mean == pytest.approx(usual.mean())


def test_mean_and_median_far_apart_are_told():
    # A third of the tokens 1.8 times as long as the others: not massive, and no one number is their norm.
    skewed = summarise(7, np.array([9.0, 10.0, 11.0, 12.0] * 10 + [19.0] * 20))
    even = summarise(8, np.array([9.0, 10.0, 11.0]))
    assert skewed.dropped == 0
    warning = ActivationNorms("mlp_out", "mean", 64, 3, (skewed, even)).warning
    assert warning
    assert "15% or more apart in layer 7 (layer 7: 13.33 and 11.5); μ is the mean" in warning
    assert warning.endswith("--statistic median")
    assert ActivationNorms("mlp_out", "mean", 64, 3, (even,)).warning is None


def test_statistics_worked_out_by_hand():
    found = summarise(4, np.array([4.0, 1.0, 100.0, 2.0, 5.0]))
    # The median of all is 4, so 100 goes; 1, 2, 4 and 5 stay: mean 3, median 3, variance 2.5.
    assert found == LayerNorms(4, 3.0, 3.0, pytest.approx(math.sqrt(2.5)), 4, 1)


def test_norms_of_several_processes_can_be_put_together(open_tiny):
    tiny = open_tiny("llama")
    parts = [
        collect_token_norms(
            tiny.loaded,
            "mlp_out",
            make_batches(encode(tiny.tokenizer, texts)),
            [2],
        )[2]
        for texts in (PROMPTS[:1], PROMPTS[1:])
    ]
    whole = measure(tiny, layers=[2]).layers[0]
    together = summarise(2, np.concatenate(parts))
    assert together.median == pytest.approx(whole.median, rel=1e-6)
    assert together.mean == pytest.approx(whole.mean, rel=1e-6)
    # What sums could not give: the median of the whole is not made of the parts' medians.
    medians = [float(np.median(part)) for part in parts]
    assert abs(np.mean(medians) / whole.median - 1) > 1e-4


def test_statistic_decides_the_value(open_tiny):
    tiny = open_tiny("llama")
    mean, median = measure(tiny), measure(tiny, statistic="median")
    assert mean.layers == median.layers
    assert mean.values() == {entry.layer: entry.mean for entry in mean.layers}
    assert median.values() == {entry.layer: entry.median for entry in mean.layers}
    assert mean.values() != median.values()
    with pytest.raises(BakeError, match="unknown statistic 'mode'; one of mean, median"):
        measure(tiny, statistic="mode")


@BOTH
@pytest.mark.parametrize("site", SITES)
def test_forward_stops_after_the_last_layer_that_is_needed(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    model, ran = tiny.loaded.model, []
    layers = [tiny.loaded.layer(layer) for layer in ALL_LAYERS]
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in [*enumerate(layers), ("head", model.lm_head)]
    ]
    try:
        measure(tiny, site, layers=[3, 1], batch_tokens=1)
        measured = list(ran)
        model(torch.tensor([[1, 5]]))
    finally:
        for handle in handles:
            handle.remove()
    assert measured == [0, 1, 2, 3] * len(PROMPTS)
    assert ran[len(measured) :] == [*ALL_LAYERS, "head"]


def test_model_runs_on_as_before_after_measuring(open_tiny):
    tiny = open_tiny("llama")
    ids = torch.tensor([[1, 50, 60]])
    with torch.no_grad():
        before = tiny.loaded.model(ids).logits
        measure(tiny)
        assert torch.equal(tiny.loaded.model(ids).logits, before)


@pytest.mark.parametrize("texts", [[], [""], ["", "</s>", "<pad><s>"]])
def test_prompts_without_content_are_refused(open_tiny, texts):
    with pytest.raises(PromptError, match="no content tokens"):
        measure(open_tiny("llama"), texts=texts)


def test_texts_without_content_beside_others_are_fine(open_tiny):
    tiny = open_tiny("llama")
    expected = measure(tiny).values()
    assert measure(tiny, texts=["", *PROMPTS, "</s>"]).values() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activation_that_is_not_finite_is_refused(load_tiny, value):
    tiny = load_tiny("llama")
    with torch.no_grad():
        tiny.loaded.model.model.layers[2].mlp.down_proj.weight[0, 0] = value
    assert measure(tiny, layers=[0, 1]).layers
    with pytest.raises(BakeError, match="layer 2 gives activations that are not finite"):
        measure(tiny, layers=[1, 2])


def test_norms_can_be_written_and_read_again(open_tiny):
    found = measure(open_tiny("llama"), "attn_in", statistic="median")
    values = found.to_dict()
    assert ActivationNorms.from_dict(values) == found
    assert [entry["layer"] for entry in values["layers"]] == [1, 3]


@pytest.mark.parametrize(
    "broken", [{}, {"layers": 3}, {"layers": [{"layer": 1}]}, {"prompts": "x"}]
)
def test_file_that_is_no_calibration_is_refused(open_tiny, broken):
    values = measure(open_tiny("llama")).to_dict()
    assert ActivationNorms.from_dict(values)
    with pytest.raises(BakeError, match="not what bake calibrate writes"):
        ActivationNorms.from_dict({**values, **broken} if broken else {})
