"""Contrast pairs: the direction against a plain difference of means, and what may not matter."""

import json

import numpy as np
import pytest
import torch
from conftest import HIDDEN, PAIRS, byte_tokenizer, read_site

from bake.directions.activations import TOKENS, PairActivations
from bake.directions.extract import ExtractionOptions, extract
from bake.directions.fit import fit_directions
from bake.errors import DirectionError
from bake.sites import SITES
from bake.texts.pairs import ContrastPair

CONTRAST = [ContrastPair(**pair) for pair in PAIRS]
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def find(tiny, pairs=CONTRAST, site="mlp_out", layers=(1, 3), model_name="", **options):
    return extract(
        tiny.loaded,
        site,
        pairs,
        list(layers),
        ExtractionOptions(**options),
        model_name=model_name,
    )


def plain_mean(tiny, site, layer, prompt, completion, token):
    """One text's mean activation, from a run of this text alone. A byte is a token, after <s>."""
    ids = byte_tokenizer()(prompt + completion)["input_ids"]
    begin = 1 + len(prompt.encode())
    if isinstance(token, int):
        place = token + (begin if token >= 0 else len(ids))
        return read_site(tiny, site, layer, ids)[place].double()
    first = {"last": len(ids) - 1, "mean": begin, "all": 1}[token]
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


@BOTH
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("token", [*TOKENS, 1, -2])
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
    assert json.loads(found.metadata["separation"])["pairs"] == 4
    assert {key: value for key, value in found.metadata.items() if key != "separation"} == {
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
        torch.testing.assert_close(backward.layer(layer), -forward.layer(layer), rtol=0, atol=2e-6)


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
        layer = tiny.loaded.layer(0, "")
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
        ({"method": "pca5"}, "unknown method 'pca5'; one of mean, pca, probe"),
        ({"token": "first"}, "unknown token position 'first'; one of last, mean, all, or an index"),
        ({"token": "4"}, "pair 3: the positive completion has 4 tokens, so none has index 4"),
        ({"token": -9}, "pair 3: the positive completion has 4 tokens, so none has index -9"),
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


def made_up(positive, negative):
    """Activations of one layer as if they had been read."""
    positive, negative = (
        torch.as_tensor(side, dtype=torch.float32) for side in (positive, negative)
    )
    norms = torch.stack([positive, negative], dim=1).flatten(0, 1).norm(dim=1)
    return PairActivations({0: positive}, {0: negative}, {0: norms})


def random_pairs(seed=0, count=40, width=8):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, count, width)
    spread = torch.linspace(0.2, 3, width)
    positive, negative = torch.randn(shape, generator=generator) * spread
    return positive + 0.5, negative


def test_principal_component_is_the_definition_of_repeng():
    """repeng's pca_diff: scikit-learn's PCA of positive − negative; most pairs decide its sign."""
    from sklearn.decomposition import PCA

    positive, negative = random_pairs()
    differences = (positive - negative).numpy()
    expected = PCA(n_components=1, svd_solver="full").fit(differences).components_[0]
    expected *= np.sign(np.sign(differences @ expected).sum())
    found = fit_directions(made_up(positive, negative), "pca")[0]
    mean = fit_directions(made_up(positive, negative), "mean")[0]
    assert abs(float(found @ mean)) < 0.9
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    back = fit_directions(made_up(negative, positive), "pca")[0]
    torch.testing.assert_close(back, -found, rtol=0, atol=1e-5)


def test_divided_pairs_leave_the_sign_to_the_mean_projection():
    differences = torch.tensor([[5.0, 0.1], [4.0, 0.1], [-1.0, 0.1], [-1.5, 0.1]])
    read = made_up(differences, torch.zeros(4, 2))
    assert fit_directions(read, "pca")[0][0] > 0.99
    turned = made_up(-differences, torch.zeros(4, 2))
    assert fit_directions(turned, "pca")[0][0] < -0.99


def test_principal_component_of_equal_differences_does_not_exist():
    positive, negative = random_pairs()
    with pytest.raises(DirectionError, match="principal component at layer 0 does not exist"):
        fit_directions(made_up(negative + 1, negative), "pca")
    with pytest.raises(DirectionError, match="does not exist"):
        fit_directions(made_up(positive[:1], negative[:1]), "pca")


def test_probe_is_logistic_regression_mapped_back_to_activations():
    """Scaling one feature scales what the probe sees of it, so its weight is divided by as much."""
    positive, negative = random_pairs()
    scale = torch.ones(8)
    scale[0] = 10.0
    plain = fit_directions(made_up(positive, negative), "probe")[0]
    scaled = fit_directions(made_up(positive * scale, negative * scale), "probe")[0]
    expected = plain / scale
    assert float(torch.cosine_similarity(plain, scaled, dim=0)) < 0.999
    torch.testing.assert_close(scaled, expected / expected.norm(), rtol=0, atol=1e-4)
    assert float((positive @ plain).mean()) > float((negative @ plain).mean())


def test_probe_ignores_a_feature_that_never_moves():
    positive, negative = random_pairs()
    positive[:, 5] = negative[:, 5] = 3.0
    found = fit_directions(made_up(positive, negative), "probe")[0]
    assert found[5] == 0
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_methods_name_the_layer_that_is_not_finite(method):
    positive, negative = random_pairs()
    positive[3, 2] = torch.nan
    with pytest.raises(DirectionError, match="at layer 0 holds NaN"):
        fit_directions(made_up(positive, negative), method)
