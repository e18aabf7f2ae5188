"""Reading a site for pairs: shared prompts, batches, padding and order must not show in the result."""

import pytest
import torch
from conftest import PAIRS

from bake import activations
from bake.activations import read_activations
from bake.contrast import find_direction
from bake.pairs import ContrastPair, encode_pairs
from bake.prompts import position_limit

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
    return read_activations(
        tiny.loaded, tiny.structure, site, encoded, LAYERS, token=token, **options
    )


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
    del rows[:2]  # The check on the longest pair.
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
    from bake.anatomy import examine

    tiny = load_tiny_mistral(load_tiny)
    tiny_structure = examine(tiny.loaded.model.config).structure
    encoded = encode_pairs(tiny.tokenizer, SHARED)
    arguments = (tiny.loaded, tiny_structure, "mlp_out", encoded, LAYERS)
    found = read_activations(*arguments)
    assert "every text runs by itself" in capsys.readouterr().err
    assert not rows[-1][1]
    assert_same(found, read_activations(*arguments, share=False))


def load_tiny_mistral(load_tiny):
    from conftest import STRUCTURES

    STRUCTURES.setdefault("mistral", STRUCTURES["llama"])
    return load_tiny("mistral")


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
    found = find_direction(
        tiny.loaded, tiny.structure, "mlp_out", tiny.tokenizer, pairs, LAYERS, token="mean"
    )
    assert capsys.readouterr().err.count("cut to the model's 40 positions") == 1
    assert sorted(found.vectors) == LAYERS
