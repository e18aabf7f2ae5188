"""Coefficients: the laws against numbers worked out by hand, the band, and the vectors they give."""

import math

import pytest
import torch

from bake.errors import BakeError
from bake.strength.coefficients import (
    DEFAULT_LAW,
    LAWS,
    band_layers,
    band_of,
    compute_push,
    parse_band,
    parse_coefficients,
)

NORMS = {2: 3.0, 3: 5.0, 4: 10.0}
UNIT = {layer: torch.eye(16)[layer] for layer in NORMS}


def push(norms=NORMS, **options):
    return compute_push(norms, UNIT, **{"hidden_size": 16, **options})


def coefficients(**options):
    return {entry.layer: entry.coefficient for entry in push(**options).layers}


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        # d = 16, so √d = 4; the mean of 3, 5 and 10 is 6.
        ("inverse-sqrt-d", {2: 0.75, 3: 1.25, 4: 2.5}),
        ("sqrt-d", {2: 12.0, 3: 20.0, 4: 40.0}),
        ("norm", {2: 3.0, 3: 5.0, 4: 10.0}),
        ("flat", {2: 1.5, 3: 1.5, 4: 1.5}),
    ],
)
def test_law_gives_the_numbers_worked_out_by_hand(law, expected):
    assert coefficients(law=law) == expected


def test_every_law_is_covered_and_the_default_is_inverse_sqrt_d():
    assert set(LAWS) == {"inverse-sqrt-d", "sqrt-d", "norm", "flat"}
    assert DEFAULT_LAW == "inverse-sqrt-d"
    assert push().law == "inverse-sqrt-d"
    assert coefficients() == coefficients(law="inverse-sqrt-d")


def test_default_law_has_the_same_relative_influence_in_every_layer():
    influences = [entry.relative_influence for entry in push(multiplier=-2.0).layers]
    assert influences == pytest.approx([2.0 / 4] * 3)
    flat = [entry.relative_influence for entry in push(law="flat").layers]
    assert flat == pytest.approx([0.5, 0.3, 0.15])


@pytest.mark.parametrize("multiplier", [-1.0, 0.25, 3.0])
@pytest.mark.parametrize("law", LAWS)
def test_multiplier_scales_every_coefficient(law, multiplier):
    single = coefficients(law=law)
    assert coefficients(law=law, multiplier=multiplier) == {
        layer: multiplier * value for layer, value in single.items()
    }


@pytest.mark.parametrize("multiplier", [0.0, math.nan, math.inf, -math.inf])
def test_multiplier_that_steers_nothing_is_refused(multiplier):
    with pytest.raises(BakeError, match=r"multiplier .* must be finite and not zero"):
        push(multiplier=multiplier)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_norm_that_is_no_positive_number_is_refused(norm):
    with pytest.raises(BakeError, match=r"norm of layer 3 is .* not a positive number"):
        push({**NORMS, 3: norm})


def test_unknown_law_names_the_laws():
    with pytest.raises(
        BakeError, match=r"'cubic'; the laws are inverse-sqrt-d, sqrt-d, norm, flat"
    ):
        push(law="cubic")


def test_explicit_coefficients_replace_the_law_and_the_multiplier_still_multiplies():
    explicit = {2: 0.5, 3: -1.0, 4: 0.0}
    found = push(law="explicit", given=explicit, multiplier=-2.0)
    assert found.law == "explicit"
    assert {entry.layer: entry.coefficient for entry in found.layers} == {2: -1.0, 3: 2.0, 4: 0.0}


def test_explicit_coefficients_of_zero_are_refused():
    with pytest.raises(BakeError, match="every coefficient is zero"):
        push(given=dict.fromkeys(NORMS, 0.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_explicit_coefficient_that_is_not_finite_is_refused(value):
    with pytest.raises(BakeError):
        push(given={**dict.fromkeys(NORMS, 1.0), 3: value})


def test_vectors_are_coefficient_times_unit_vector():
    generator = torch.Generator().manual_seed(0)
    units = torch.randn(3, 16, generator=generator)
    units = units / units.norm(dim=1, keepdim=True)
    found = compute_push(NORMS, dict(zip(NORMS, units, strict=True)), hidden_size=16, multiplier=-3)
    assert sorted(found.vectors) == [2, 3, 4]
    for unit, layer in zip(units, NORMS, strict=True):
        expected = -3 * NORMS[layer] / 4 * unit
        assert found.vectors[layer].dtype == torch.float32
        torch.testing.assert_close(found.vectors[layer], expected, rtol=1e-6, atol=0)
        assert found.vectors[layer].norm().item() == pytest.approx(3 * NORMS[layer] / 4, rel=1e-6)


def test_push_describes_itself_in_plain_values():
    found = compute_push({7: 8.0, 6: 4.0}, {6: UNIT[2], 7: UNIT[3]}, hidden_size=16, multiplier=2.0)
    assert found.to_dict() == {
        "law": "inverse-sqrt-d",
        "multiplier": 2.0,
        "band": [6, 8],
        "hidden_size": 16,
        "layers": [
            {"layer": 6, "activation_norm": 4.0, "coefficient": 2.0},
            {"layer": 7, "activation_norm": 8.0, "coefficient": 4.0},
        ],
    }


@pytest.mark.parametrize(
    ("count", "expected"),
    [(6, (2, 5)), (12, (4, 10)), (26, (10, 23)), (32, (12, 28)), (80, (32, 72)), (126, (50, 113))],
)
def test_default_band_of_known_models(count, expected):
    assert band_layers(count) == range(*expected)


def test_default_band_is_exact_at_every_depth():
    # Integer arithmetic has no rounding, so it shows where a float would fall on the wrong side.
    assert all(band_layers(n) == range(4 * n // 10, 9 * n // 10) for n in range(2, 300))


def test_every_band_of_whole_per_cents_is_exact():
    # 0.29 · 100 is 28.999999999999996 and 0.07 · 100 is 7.000000000000001.
    assert int(0.29 * 100) == 28
    for count in (10, 25, 32, 48, 100):
        for start in range(0, 100, 3):
            layers = range(start * count // 100, (start + 37) * count // 100)
            if start + 37 <= 100 and layers:
                assert band_layers(count, parse_band(f"{start}:{start + 37}")) == layers


def test_layers_are_named_as_a_band():
    assert band_of([3], 9) == "34:45"
    assert band_of([1, 0], 6) == "0:34"
    assert band_of([3, 5], 9) is None
    for count in (1, 7, 100, 126, 251):
        for first in range(count):
            text = band_of(range(first, min(count, first + 3)), count)
            assert band_layers(count, parse_band(text)) == range(first, min(count, first + 3))


def test_whole_depth_is_a_band():
    assert band_layers(7, (0.0, 1.0)) == range(7)


@pytest.mark.parametrize("band", [(0.5, 0.5), (0.9, 0.4), (-0.5, 0.5), (0.4, 1.2), (0.4, 0.41)])
def test_band_without_a_layer_is_refused(band):
    with pytest.raises(BakeError, match="of 6 layers holds no layer"):
        band_layers(6, band)


@pytest.mark.parametrize("text", ["nan:90", "40:nan", "40:inf"])
def test_band_that_is_not_finite_is_refused(text):
    with pytest.raises(BakeError):
        band_layers(6, parse_band(text))


def test_band_text_is_per_cent():
    assert parse_band("40:90") == (0.4, 0.9)
    assert parse_band("12.5:50") == (0.125, 0.5)


@pytest.mark.parametrize("text", ["", "40", "40-90", "40:90:95", "a:b", ":90"])
def test_band_text_that_is_no_band_is_refused(text):
    with pytest.raises(BakeError, match="is not START:STOP in per cent"):
        parse_band(text)


def test_coefficients_text():
    assert parse_coefficients("6=0.5,8=-1") == {6: 0.5, 8: -1.0}


@pytest.mark.parametrize("text", ["", "6", "6=", "=1", "6=1,", "6=1=2", "a=1", "6=b", "0.5=1"])
def test_coefficients_text_that_is_malformed_is_refused(text):
    with pytest.raises(BakeError, match="are not LAYER=VALUE"):
        parse_coefficients(text)


def test_coefficients_that_name_a_layer_twice_are_refused():
    with pytest.raises(BakeError, match="name a layer twice"):
        parse_coefficients("6=0.5,06=1")
