"""Reading a site for pairs: shared prompts, batches, padding and order must not show in the result."""

from dataclasses import replace

import pytest
import torch
from conftest import PAIRS

from bake.anatomy import examine
from bake.directions import activations
from bake.directions.activations import read_activations
from bake.directions.extract import ExtractionOptions, extract
from bake.directions.shared_prompts import row_length
from bake.errors import UnsupportedError
from bake.texts.pair_tokens import encode_pairs
from bake.texts.pairs import ContrastPair
from bake.texts.prompts import position_limit

SHARED = [
    ContrastPair("The day was long and the road went on, and it was ", "bright.", "grey and cold."),
    ContrastPair("She heard the tune of the town band and said it was ", "lovely!", "awful."),
    *(ContrastPair(**pair) for pair in PAIRS),
]
LAYERS = [1, 3]


@pytest.fixture
def rows(monkeypatch):
    """The shapes of the batches that reach the model, and whether each had a mask of its own."""
    seen = []
    run = activations.run_layers

    def watched(loaded, batches, *arguments):
        seen.extend((tuple(b.input_ids.shape), b.attention_mask.ndim == 4) for b in batches)
        return run(loaded, batches, *arguments)

    monkeypatch.setattr(activations, "run_layers", watched)
    return seen


def read(tiny, pairs=SHARED, site="mlp_out", token="mean", **options):
    encoded = encode_pairs(tiny.tokenizer, pairs)
    return read_activations(tiny.loaded, site, encoded, LAYERS, token=token, **options)


def assert_same(found, expected, bound=1e-5):
    for layer in LAYERS:
        for side in ("positive", "negative", "norms"):
            a, b = getattr(found, side)[layer], getattr(expected, side)[layer]
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * float(b.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("site", ["mlp_out", "attn_in"])
@pytest.mark.parametrize("token", ["last", "all"])
def test_a_shared_prompt_is_computed_once_and_changes_nothing(
    open_tiny, rows, architecture, site, token
):
    tiny = open_tiny(architecture)
    plain = read(tiny, site=site, token=token, share=False)
    computed = sum(height * width for (height, width), _ in rows)
    assert not any(shared for _, shared in rows)
    rows.clear()
    shared = read(tiny, site=site, token=token, share=True)
    assert any(own_mask for _, own_mask in rows)
    del rows[:2]  # The check on the longest pairs.
    assert sum(height * width for (height, width), _ in rows) < 0.8 * computed
    assert_same(shared, plain)
    assert (shared.positive[3] - shared.negative[3]).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "batching", [{"batch_tokens": 1}, {"batch_tokens": 120}, {"padding_side": "left"}]
)
def test_batches_and_padding_do_not_matter(open_tiny, rows, architecture, share, batching):
    tiny = open_tiny(architecture)
    expected = read(tiny)
    one = len(rows)
    found = read(tiny, share=share, **batching)
    assert len(rows) - one > 1 or "padding_side" in batching
    assert_same(found, expected)


def test_order_does_not_matter(open_tiny):
    found, expected = read(open_tiny("llama"), SHARED[::-1]), read(open_tiny("llama"))
    assert_same(found.select(range(len(SHARED))[::-1]), expected)
    assert (found.positive[1] - expected.positive[1]).abs().max() > 0.1


def test_a_model_whose_attention_has_a_window_does_not_share(load_tiny, rows, capsys):
    """A sliding window of 8 is not in the mask that a shared row brings: measured, and not shared."""
    tiny = load_tiny_mistral(load_tiny)
    encoded = encode_pairs(tiny.tokenizer, SHARED)
    arguments = (tiny.loaded, "mlp_out", encoded, LAYERS)
    found = read_activations(*arguments)
    assert "every text runs by itself" in capsys.readouterr().err
    assert not rows[-1][1]
    assert_same(found, read_activations(*arguments, share=False))


def test_a_window_is_seen_on_the_longest_text(load_tiny, capsys):
    """The pair with the longest row has texts inside the window; another pair's text is cut by it."""
    tiny = load_tiny_mistral(load_tiny, (("sliding_window", 40),))
    pairs = [
        ContrastPair("It was a", " bright and lovely summer day", " grey and cold winter evening"),
        ContrastPair("The day was long, the road went on and on: it was ", "good", "grey"),
    ]
    first, _ = encoded = encode_pairs(tiny.tokenizer, pairs)
    texts, rows = ([function(pair) for pair in encoded] for function in (longest_text, row_length))
    assert texts[0] < 40 < texts[1]
    assert rows[0] > rows[1]
    arguments = (tiny.loaded, "mlp_out")
    found = read_activations(*arguments, encoded, LAYERS)
    assert "every text runs by itself" in capsys.readouterr().err
    assert_same(found, read_activations(*arguments, encoded, LAYERS, share=False))
    read_activations(*arguments, [first], LAYERS)
    assert not capsys.readouterr().err


def test_a_massive_activation_hides_no_window_in_half_precision(load_tiny, capsys):
    """One feature a hundred times the rest: an allowance that is relative to it lets all else be wrong."""
    tiny = load_tiny_mistral(load_tiny)
    with torch.no_grad():
        for layer in tiny.loaded.model.model.layers:
            layer.input_layernorm.weight[0] = 0.0
            layer.post_attention_layernorm.weight[0] = 0.0
        tiny.loaded.model.model.embed_tokens.weight[:, 0] = 30.0
    tiny.loaded.model.to(torch.bfloat16)
    encoded = encode_pairs(tiny.tokenizer, SHARED)
    arguments = (tiny.loaded, "mlp_out", encoded, LAYERS)
    found = read_activations(*arguments)
    assert found.positive[3][:, 0].min() > 10 * found.positive[3][:, 1:].abs().median()
    assert "every text runs by itself" in capsys.readouterr().err


def longest_text(pair):
    return max(len(text.ids) for text in pair.texts)


def load_tiny_mistral(load_tiny, config=()):
    from conftest import STRUCTURES

    STRUCTURES.setdefault("mistral", STRUCTURES["llama"])
    tiny = load_tiny("mistral", config=config)
    structure = examine(tiny.loaded.model.config).structure
    return replace(tiny, loaded=replace(tiny.loaded, structure=structure))


def test_activations_of_another_shape_are_refused(open_tiny):
    """Four streams, or positions first: read as one stream they would be those of other tokens."""
    tiny = open_tiny("llama")
    layer = tiny.loaded.model.model.layers[1]
    for change in (lambda out: torch.stack([out] * 4), lambda out: out.transpose(0, 1)):
        handle = layer.register_forward_hook(lambda _m, _a, out, change=change: change(out))
        with pytest.raises(UnsupportedError, match="one stream's would be"):
            read_activations(
                tiny.loaded,
                "mlp_out",
                encode_pairs(tiny.tokenizer, SHARED),
                [1],
                share=False,
            )
        handle.remove()


def test_norms_are_those_of_the_tokens_that_were_read(open_tiny):
    found = read(open_tiny("llama"), token="last")
    texts = torch.stack([found.positive[3], found.negative[3]], dim=1).flatten(0, 1)
    torch.testing.assert_close(found.norms[3], texts.norm(dim=1))


def test_texts_longer_than_learned_positions_are_cut(load_tiny, capsys):
    """Learned positions end: without a cut, the embedding would be asked for one that is not there."""
    tiny = load_tiny("gpt2", config=(("n_positions", 40),))
    assert position_limit(tiny.loaded.model.config) == 40
    pairs = [*SHARED, ContrastPair("so " * 30, "good", "bad")]
    with pytest.raises(IndexError):
        read(tiny, pairs)
    chosen = ExtractionOptions(token="mean")
    found = extract(tiny.loaded, "mlp_out", pairs, LAYERS, chosen)
    assert capsys.readouterr().err.count("cut to the model's 40 positions") == 1
    assert sorted(found.vectors) == LAYERS
