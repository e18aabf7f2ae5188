"""Sites: which module each one means, what a slot receives, which directions suit which site."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bake.errors import DirectionError, UnsupportedError
from bake.sites import (
    DESCRIPTIONS,
    SITES,
    LayerStructure,
    Location,
    Slot,
    addition_location,
    capture_location,
    check_direction_site,
    check_site,
    is_usable_at,
)

FULL = LayerStructure("model.layers", "self_attn", "mlp", "post_attention_layernorm", 0.5)
BARE = LayerStructure("model.layers", None, None, None)


def test_every_site_is_described():
    assert SITES == ("mlp_out", "attn_out", "attn_in", "mlp_in")
    assert set(DESCRIPTIONS) == set(SITES)


@pytest.mark.parametrize("site", SITES)
def test_known_site_passes(site):
    assert check_site(site) == site


def test_unknown_site_names_the_sites():
    with pytest.raises(UnsupportedError, match=r"'resid'; .* mlp_out, attn_out, attn_in, mlp_in"):
        check_site("resid")


def test_layer_path():
    assert FULL.layer(3) == "model.layers.3"


@pytest.mark.parametrize(
    ("site", "captured", "added", "factor"),
    [
        ("mlp_out", Location("", "output"), Location("", "output"), 1.0),
        (
            "attn_out",
            Location("post_attention_layernorm", "input"),
            Location("self_attn", "output"),
            2.0,  # Attention's output is halved on its way to the residual stream.
        ),
        ("attn_in", Location("self_attn", "input"), Location("self_attn", "input"), 1.0),
        ("mlp_in", Location("mlp", "input"), Location("mlp", "input"), 1.0),
    ],
)
def test_locations_of_a_site(site, captured, added, factor):
    assert capture_location(site, FULL) == captured
    assert addition_location(site, FULL) == (added, factor)


@pytest.mark.parametrize("site", ["attn_out", "attn_in", "mlp_in"])
def test_site_that_the_layer_lacks_is_refused(site):
    with pytest.raises(UnsupportedError, match=f"no {site} site"):
        capture_location(site, BARE)


def test_bare_layer_still_has_an_output():
    assert capture_location("mlp_out", BARE) == Location("", "output")


def test_unknown_site_has_no_location():
    with pytest.raises(UnsupportedError, match="unknown site 'mlp'"):
        capture_location("mlp", FULL)


def test_write_slot_receives_the_push_divided_by_the_scale():
    push = torch.tensor([1.0, -2.0, 3.0])
    assert Slot("down_proj.bias").delta(push, None).tolist() == [1.0, -2.0, 3.0]
    assert Slot("down_proj.bias", scale=0.5).delta(push, None).tolist() == [2.0, -4.0, 6.0]


@pytest.mark.parametrize("transposed", [False, True])
def test_projection_slot_absorbs_a_push_of_its_input(transposed):
    torch.manual_seed(0)
    layer = Conv1D(7, 5) if transposed else nn.Linear(5, 7)
    layer.requires_grad_(False)
    inputs, push = torch.randn(4, 5), torch.randn(5)
    hooked, before = layer(inputs + push), layer(inputs)
    assert (hooked - before).abs().max() > 0.01
    slot = Slot("q.bias", "q.weight", transposed=transposed)
    layer.bias += slot.delta(push, layer.weight)
    torch.testing.assert_close(layer(inputs), hooked, rtol=1e-5, atol=1e-6)


def test_wrong_orientation_of_a_square_matrix_gives_another_delta():
    matrix, push = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])
    assert Slot("b", "w").delta(push, matrix).tolist() == [21.0, 43.0]
    assert Slot("b", "w", transposed=True).delta(push, matrix).tolist() == [31.0, 42.0]


def test_delta_is_computed_in_float64():
    push = torch.tensor([1.0, 2.0**-30])
    matrix = torch.ones(1, 2, dtype=torch.bfloat16)
    found = Slot("b", "w").delta(push, matrix)
    assert found.dtype == torch.float64
    assert found.item() == 1.0 + 2.0**-30
    assert Slot("b", scale=3.0).delta(push, None)[0].item() == 1 / 3


def test_projection_slot_without_its_matrix_is_refused():
    with pytest.raises(UnsupportedError, match=r"q\.bias needs the matrix q\.weight"):
        Slot("q.bias", "q.weight").delta(torch.ones(2), None)


@pytest.mark.parametrize("site", SITES)
def test_direction_at_its_own_site_needs_no_word(site):
    assert check_direction_site(site, site, convert=False) is None
    assert is_usable_at(site, site)


@pytest.mark.parametrize(("found_at", "site"), [("mlp_out", "attn_out"), ("attn_out", "mlp_out")])
def test_residual_sites_are_interchangeable_and_announced(found_at, site):
    note = check_direction_site(found_at, site, convert=False)
    assert note == f"the direction was found at {found_at}; {site} is the same residual stream"
    assert is_usable_at(found_at, site)


@pytest.mark.parametrize("found_at", ["mlp_out", "attn_out"])
@pytest.mark.parametrize("site", ["attn_in", "mlp_in"])
def test_residual_direction_at_an_input_is_refused_unless_converted(found_at, site):
    with pytest.raises(DirectionError, match=rf"{found_at} .* --site {site}\) or .*--convert-site"):
        check_direction_site(found_at, site, convert=False)
    assert "converted" in check_direction_site(found_at, site, convert=True)
    assert not is_usable_at(found_at, site)


@pytest.mark.parametrize(
    ("found_at", "site"), [("attn_in", "mlp_out"), ("mlp_in", "attn_out"), ("attn_in", "mlp_in")]
)
@pytest.mark.parametrize("convert", [False, True])
def test_input_direction_elsewhere_is_always_refused(found_at, site, convert):
    with pytest.raises(DirectionError, match=f"found at {found_at} and cannot be used at {site}"):
        check_direction_site(found_at, site, convert=convert)
    assert not is_usable_at(found_at, site)


def test_a_solved_slot_receives_what_its_matrix_makes_the_push_of():
    """A value bias b: attention adds W_o · b, as the softmax's weights sum to one."""
    matrix = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    push = torch.arange(1.0, 7.0)
    slot = Slot("v", "o", solved=True, scale=0.5)
    assert torch.allclose(matrix @ slot.delta(push, matrix), push.double() / 0.5)
    turned = Slot("v", "o", solved=True, transposed=True)
    assert torch.allclose(matrix @ turned.delta(push, matrix.T), push.double())
    flat = torch.cat([matrix[:5], matrix[:1]])  # The last channel writes what the first does.
    with pytest.raises(
        UnsupportedError, match=r"v reaches only a part of the push: \d+\.\d% of it"
    ):
        slot.delta(push, flat)
