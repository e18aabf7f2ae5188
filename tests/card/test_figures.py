"""The figures themselves: what they draw of odd values, and that the same values give the same bytes."""

import pytest
from matplotlib import image

from bake.card.figures import draw_norms, draw_separation

NORMS = {layer: 1.0 + layer for layer in range(6)}


def test_the_same_values_give_the_same_figure(tmp_path):
    paths = [draw_norms(tmp_path / f"{n}.png", NORMS, {3: 0.5, 4: 0.6}, "mlp_out") for n in "ab"]
    other = draw_norms(tmp_path / "c.png", NORMS, {3: 0.5, 4: 0.7}, "mlp_out")
    assert paths[0].read_bytes() == paths[1].read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    "coefficients", [{3: 0.5}, {3: -0.5, 4: -0.1}, {0: -1.0, 5: 1.0}, {2: 1e-9, 3: 1e9}]
)
def test_norms_are_drawn_for_any_coefficients(tmp_path, coefficients):
    drawn = image.imread(draw_norms(tmp_path / "new" / "a.png", NORMS, coefficients, "attn_in", -2))
    assert drawn.std() > 0.05  # Something is on the paper.


@pytest.mark.parametrize("layers", [[3], [0, 1, 2, 5]])
def test_separation_is_drawn_for_any_layers(tmp_path, layers):
    accuracy = {layer: (0.5 + layer / 10, 0.4, 1.0) for layer in layers}
    assert image.imread(draw_separation(tmp_path / "a.png", accuracy)).std() > 0.05
