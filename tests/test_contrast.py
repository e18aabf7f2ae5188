"""Contrast pairs: the direction against a plain difference of means, and what may not matter."""

import json

import pytest
import torch
from conftest import HIDDEN, PAIRS, byte_tokenizer, read_site

from bake import contrast
from bake.contrast import TOKENS, ContrastPair, find_direction, read_pairs
from bake.errors import DirectionError, PromptError
from bake.prompts import make_batches
from bake.sites import SITES
from bake.steering import submodule

CONTRAST = [ContrastPair(**pair) for pair in PAIRS]
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def find(tiny, pairs=CONTRAST, site="mlp_out", layers=(1, 3), **options):
    return find_direction(
        tiny.loaded, tiny.structure, site, tiny.tokenizer, pairs, list(layers), **options
    )


def plain_mean(tiny, site, layer, prompt, completion, token):
    """One text's mean activation, from a run of this text alone. A byte is a token, after <s>."""
    ids = byte_tokenizer()(prompt + completion)["input_ids"]
    first = {"last": len(ids) - 1, "mean": 1 + len(prompt.encode()), "all": 1}[token]
    return read_site(tiny, site, layer, ids)[first:].double().mean(dim=0)


def plain_direction(tiny, site, layer, token):
    differences = [
        plain_mean(tiny, site, layer, pair.prompt, pair.positive, token)
        - plain_mean(tiny, site, layer, pair.prompt, pair.negative, token)
        for pair in CONTRAST
    ]
    mean = torch.stack(differences).mean(dim=0)
    return (mean / mean.norm()).float()


def assert_same(found, expected, bound=1e-5):
    assert sorted(found.vectors) == sorted(expected.vectors)
    for layer, vector in found.vectors.items():
        torch.testing.assert_close(vector, expected.vectors[layer], rtol=0, atol=bound)


def write(path, rows):
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


@BOTH
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("token", TOKENS)
def test_direction_equals_a_plain_difference_of_means(open_tiny, architecture, site, token):
    tiny = open_tiny(architecture)
    found = find(tiny, site=site, token=token)
    assert found.site == site
    assert sorted(found.vectors) == [1, 3]
    for layer, vector in found.vectors.items():
        expected = plain_direction(tiny, site, layer, token)
        torch.testing.assert_close(vector, expected, rtol=0, atol=2e-6)
        assert vector.norm().item() == pytest.approx(1, abs=1e-6)
    assert (found.vectors[1] - found.vectors[3]).abs().max() > 0.05


def test_token_positions_give_different_directions(open_tiny):
    last, mean, every = (find(open_tiny("llama"), token=token).layer(3) for token in TOKENS)
    assert all(float(a @ b) < 0.98 for a, b in ((last, mean), (last, every), (mean, every)))


def test_direction_says_where_it_came_from(open_tiny):
    found = find(open_tiny("llama"), token="mean", model_name="org/model")
    assert found.metadata == {
        "method": "mean",
        "token": "mean",
        "pairs": "4",
        "model": "org/model",
    }


def test_swapped_pairs_point_the_other_way(open_tiny):
    tiny = open_tiny("llama")
    swapped = [ContrastPair(pair.prompt, pair.negative, pair.positive) for pair in CONTRAST]
    forward, backward = find(tiny), find(tiny, swapped)
    for layer in (1, 3):
        assert torch.equal(backward.layer(layer), -forward.layer(layer))


@BOTH
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "batching",
    [{"batch_tokens": 1}, {"batch_tokens": 80}, {"padding_side": "left"}],
    ids=["alone", "small", "left"],
)
def test_batches_and_padding_do_not_matter(open_tiny, monkeypatch, architecture, token, batching):
    tiny = open_tiny(architecture)
    expected = find(tiny, token=token)
    sizes = []

    def batches(encoded):
        made = make_batches(encoded, **batching)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(contrast, "make_batches", batches)
    assert_same(find(tiny, token=token), expected)
    assert sizes == [{1: 8, 80: sizes[0]}.get(batching.get("batch_tokens"), 1)]


def test_order_of_the_pairs_does_not_matter(open_tiny):
    tiny = open_tiny("llama")
    assert_same(find(tiny, CONTRAST[::-1]), find(tiny))
    assert (find(tiny, CONTRAST[:2]).layer(3) - find(tiny).layer(3)).abs().max() > 0.01


def test_last_token_is_the_last_content_token(load_tiny):
    """A tokenizer that ends its texts with </s> must not move what "last" reads."""
    from tokenizers.processors import TemplateProcessing

    tiny = load_tiny("llama")
    expected = find(tiny)
    tiny.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tiny.tokenizer("a")["input_ids"][-1] == 2
    assert_same(find(tiny), expected)


def test_characters_of_several_bytes_do_not_shift_the_completion(open_tiny):
    tiny = open_tiny("llama")
    pair = ContrastPair("Für die Fährte: ", "schön", "trüb")
    found = find(tiny, [pair], token="mean").layer(3)
    means = [
        plain_mean(tiny, "mlp_out", 3, pair.prompt, text, "mean")
        for text in (pair.positive, pair.negative)
    ]
    difference = means[0] - means[1]
    torch.testing.assert_close(found, (difference / difference.norm()).float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("token", TOKENS)
def test_planted_direction_is_recovered(load_tiny, token):
    """Every plus sign carries a direction and every minus sign its opposite, beside other content."""
    tiny = load_tiny("llama")
    planted = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    planted = planted / planted.norm()
    plus, minus = tiny.tokenizer.convert_tokens_to_ids(["+", "-"])
    pairs = [ContrastPair(p.prompt, p.positive + "+++", p.positive + "---") for p in CONTRAST]
    assert float(find(tiny, pairs, layers=[0], token=token).layer(0) @ planted) < 0.8
    # The layer that is read passes its input on, so that only the plant tells the texts apart.
    embedding = tiny.loaded.model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[minus] = embedding[plus]
        embedding[plus] += 4 * planted
        embedding[minus] -= 4 * planted
        layer = submodule(tiny.loaded.model, tiny.structure, 0, "")
        layer.mlp.down_proj.weight *= 0.05
        layer.self_attn.o_proj.weight *= 0.05
    found = find(tiny, pairs, layers=[0], token=token).layer(0)
    assert float(found @ planted) > 0.98


def test_base_keeps_no_hook(open_tiny):
    tiny = open_tiny("llama")
    modules = list(tiny.loaded.model.modules())

    def hooks():
        return [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in modules]

    before = hooks()
    find(tiny)
    assert hooks() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pca5"}, "unknown method 'pca5'; one of mean"),
        ({"token": "first"}, "unknown token position 'first'; one of last, mean, all"),
    ],
)
def test_unknown_option_is_refused(open_tiny, options, message):
    with pytest.raises(DirectionError, match=message):
        find(open_tiny("llama"), **options)


def test_texts_that_do_not_differ_where_they_are_read_are_refused(open_tiny):
    # The last content token comes before what differs, and attention looks back only.
    pairs = [ContrastPair("", "same</s>", "same<pad>")]
    with pytest.raises(DirectionError, match="difference of means at layer 1 is all zeros"):
        find(open_tiny("llama"), pairs, token="last")


def test_text_without_content_is_refused(open_tiny):
    with pytest.raises(DirectionError, match="no content token"):
        find(open_tiny("llama"), [ContrastPair("", "</s>", "fine")])


def test_activation_that_is_not_finite_is_refused(load_tiny):
    tiny = load_tiny("llama")
    with torch.no_grad():
        tiny.loaded.model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    assert find(tiny, layers=[1]).vectors
    with pytest.raises(DirectionError, match="at layer 2 holds NaN"):
        find(tiny, layers=[1, 2])


def test_pairs_file(pairs_file):
    assert read_pairs(pairs_file) == CONTRAST


def test_prompt_may_be_left_out(tmp_path):
    path = write(tmp_path / "p.jsonl", ['{"positive": "a", "negative": "b"}'])
    assert read_pairs(path) == [ContrastPair("", "a", "b")]


def test_shipped_pairs_have_names():
    shipped = read_pairs("cheerful-gloomy")
    assert len(shipped) > 50
    assert all(pair.positive != pair.negative for pair in shipped)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{positive: a}", PromptError, "p.jsonl:2 is not JSON"),
        ('["a", "b"]', PromptError, "p.jsonl:2 is not a JSON object"),
        ('{"positive": 5, "negative": "b"}', PromptError, "p.jsonl:2: .* must be strings"),
        ('{"positive": "a", "negative": null}', PromptError, "p.jsonl:2: .* must be strings"),
        ('{"positive": "a"}', DirectionError, "p.jsonl:2: an empty completion"),
        ('{"positive": " ", "negative": "b"}', DirectionError, "p.jsonl:2: an empty completion"),
        ('{"positive": "a", "negative": "a"}', DirectionError, "p.jsonl:2: .* identical"),
    ],
)
def test_malformed_pair_is_named(tmp_path, line, error, message):
    fine = json.dumps({"positive": "a", "negative": "b"})
    with pytest.raises(error, match=message):
        read_pairs(write(tmp_path / "p.jsonl", [fine, line]))


def test_file_without_pairs_is_refused(tmp_path):
    with pytest.raises(PromptError, match="holds no pairs"):
        read_pairs(write(tmp_path / "p.jsonl", ["", " "]))


def test_missing_file_names_the_shipped_sets(tmp_path):
    with pytest.raises(PromptError, match=r"nowhere\.jsonl'; .*cheerful-gloomy"):
        read_pairs(tmp_path / "nowhere.jsonl")
