"""Steering: a hook adds exactly the push at its site, and nothing stays behind."""

import pytest
import torch
from conftest import HIDDEN, LAYERS, read_site
from transformers import GraniteConfig, GraniteForCausalLM

from bake.hooks import captured, steered, submodule
from bake.models.forward import LoadedModel
from bake.sites import SITES, LayerStructure

IDS = (1, 40, 50, 60, 70, 80)
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])
EVERY_SITE = pytest.mark.parametrize("site", SITES)


def vector(seed=0):
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))


def logits(tiny):
    with torch.no_grad():
        return tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits


def hook_count(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@BOTH
@EVERY_SITE
def test_hook_adds_exactly_the_push_at_every_position(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    before = read_site(tiny, site, 2, IDS)
    with steered(tiny.loaded.model, tiny.structure, site, {2: vector()}):
        after = read_site(tiny, site, 2, IDS)
    assert after.shape == (len(IDS), HIDDEN)
    # After attention's add the sum is rounded twice; elsewhere it is bit for bit.
    bound = 2e-6 if site == "attn_out" else 0
    torch.testing.assert_close(after, before + vector(), rtol=0, atol=bound)


@BOTH
@EVERY_SITE
def test_with_a_mask_the_push_is_at_the_texts_own_tokens_alone(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    before = read_site(tiny, site, 2, IDS)
    with steered(tiny.loaded.model, tiny.structure, site, {2: vector()}, mask=mask):
        after = read_site(tiny, site, 2, IDS)
    expected = before + mask[0, :, None] * vector()
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)
    assert torch.equal(after[:2], before[:2])


@BOTH
@EVERY_SITE
def test_only_what_follows_the_site_changes(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    previous, following = read_site(tiny, site, 1, IDS), read_site(tiny, site, 3, IDS)
    with steered(tiny.loaded.model, tiny.structure, site, {2: vector()}):
        assert torch.equal(read_site(tiny, site, 1, IDS), previous)
        assert (read_site(tiny, site, 3, IDS) - following).abs().max() > 1e-2


def test_push_reaches_every_layer_it_names(open_tiny):
    tiny = open_tiny("llama")
    model, structure = tiny.loaded.model, tiny.structure
    with steered(model, structure, "mlp_out", {1: vector(1)}):
        first = read_site(tiny, "mlp_out", 4, IDS)
        with steered(model, structure, "mlp_out", {4: vector(4)}):
            nested = read_site(tiny, "mlp_out", 4, IDS)
    with steered(model, structure, "mlp_out", {1: vector(1), 4: vector(4)}):
        both = read_site(tiny, "mlp_out", 4, IDS)
    assert torch.equal(both, first + vector(4))
    assert torch.equal(both, nested)


@pytest.mark.parametrize("factor", [-1.0, 0.5, -3.0])
def test_factor_scales_the_push(open_tiny, factor):
    tiny = open_tiny("llama")
    model, structure = tiny.loaded.model, tiny.structure
    with steered(model, structure, "mlp_out", {2: factor * vector()}):
        expected = logits(tiny)
    with steered(model, structure, "mlp_out", {2: vector()}):
        assert (logits(tiny) - expected).abs().max() > 1e-2
    with steered(model, structure, "mlp_out", {2: vector()}, factor=factor):
        assert torch.equal(logits(tiny), expected)


@BOTH
@EVERY_SITE
def test_base_is_untouched_after_the_context(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    model, base = tiny.loaded.model, logits(tiny)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = hook_count(model)
    with steered(model, tiny.structure, site, {2: vector(), 3: vector()}):
        assert hook_count(model) == hooks + 2
        assert (logits(tiny) - base).abs().max() > 1e-2
    assert hook_count(model) == hooks
    assert torch.equal(logits(tiny), base)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("context", ["steered", "captured"])
def test_hooks_go_away_on_an_exception(open_tiny, context):
    tiny = open_tiny("llama")
    model, hooks, base = tiny.loaded.model, hook_count(tiny.loaded.model), logits(tiny)
    opened = (
        steered(model, tiny.structure, "attn_in", {2: vector()})
        if context == "steered"
        else captured(model, tiny.structure, "attn_in", [2], lambda *_: None)
    )
    inside = []

    def fail():
        with opened:
            inside.append(hook_count(model))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert inside == [hooks + 1]
    assert hook_count(model) == hooks
    assert torch.equal(logits(tiny), base)


def test_layer_that_does_not_exist_leaves_no_hook_behind(load_tiny):
    tiny = load_tiny("llama")
    model, hooks = tiny.loaded.model, hook_count(tiny.loaded.model)
    push = {2: vector(), LAYERS: vector()}
    with (
        pytest.raises((AttributeError, IndexError)),
        steered(model, tiny.structure, "mlp_out", push),
    ):
        pass
    assert hook_count(model) == hooks


def test_residual_multiplier_is_undone_at_attn_out():
    config = GraniteConfig(
        hidden_size=HIDDEN,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        residual_multiplier=0.25,
    )
    model = GraniteForCausalLM(config).eval()
    loaded = LoadedModel(model, {}, torch.device("cpu"))
    names = ("model.layers", "self_attn", "mlp", "post_attention_layernorm")

    def moved(scale):
        residual = []
        norm = model.get_submodule("model.layers.1.post_attention_layernorm")
        handle = norm.register_forward_pre_hook(lambda _module, inputs: residual.append(inputs[0]))
        with torch.no_grad():
            loaded.model(torch.tensor([IDS]), use_cache=False)
            with steered(model, LayerStructure(*names, scale), "attn_out", {1: vector()}):
                loaded.model(torch.tensor([IDS]), use_cache=False)
        handle.remove()
        return (residual[1] - residual[0])[0]

    expected = vector().expand(len(IDS), HIDDEN)
    torch.testing.assert_close(moved(0.25), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(moved(1.0), 0.25 * expected, rtol=0, atol=2e-6)


def test_hook_keeps_the_dtype_of_the_model(load_tiny):
    tiny = load_tiny("llama")
    tiny.loaded.model.bfloat16()
    base = logits(tiny)
    with steered(tiny.loaded.model, tiny.structure, "mlp_out", {2: vector()}):
        steered_logits = logits(tiny)
    assert steered_logits.dtype == base.dtype == torch.bfloat16
    assert (steered_logits - base).abs().max() > 0.1


@BOTH
@EVERY_SITE
def test_captured_reads_the_site_and_changes_nothing(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    base, seen = logits(tiny), {}
    with captured(tiny.loaded.model, tiny.structure, site, [4, 1], seen.__setitem__):
        assert torch.equal(logits(tiny), base)
    assert sorted(seen) == [1, 4]
    for layer, activation in seen.items():
        assert activation.shape == (1, len(IDS), HIDDEN)
        assert torch.equal(activation[0], read_site(tiny, site, layer, IDS))
    assert (seen[1] - seen[4]).abs().max() > 0.1


def test_submodule_of_the_empty_path_is_the_layer(open_tiny):
    tiny = open_tiny("gpt2")
    model = tiny.loaded.model
    assert submodule(model, tiny.structure, 3, "") is model.transformer.h[3]
    assert submodule(model, tiny.structure, 3, "mlp.c_fc") is model.transformer.h[3].mlp.c_fc
