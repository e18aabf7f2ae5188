"""What a push costs on neutral text: against a plain reckoning, and the sentences on it."""

import math

import pytest
import torch

from bake.proof.cost import LEAST_KL, MOST_KL, Cost, measure_cost
from bake.strength.coefficients import compute_push


@pytest.fixture
def push():
    """Unit vectors e0 and e1 at layers 3 and 4, of norms 8 and 10."""
    directions = {3: torch.eye(4)[0], 4: torch.eye(4)[1]}
    return compute_push({3: 8.0, 4: 10.0}, directions, hidden_size=4)


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_kl_is_of_the_base_from_the_steered(push):
    base, steered = logits([0.0, 0.0]), logits([math.log(3.0), 0.0])
    cost = measure_cost([base], [steered], push, "mlp_out")
    # ½ ln(½ / ¾) + ½ ln(½ / ¼); the other way round it is 0.131.
    assert cost.kl_mean == pytest.approx(0.1438, abs=1e-4)


def test_figures_are_over_the_tokens_of_all_texts(push):
    base = [torch.zeros(1, 3), torch.zeros(19, 3)]
    steered = [logits([0.0, 4.0, 0.0]), torch.zeros(19, 3)]
    cost = measure_cost(base, steered, push, "mlp_out")
    assert cost.tokens == 20
    assert cost.top1_agreement == 19 / 20
    assert 0 < cost.kl_p95 < cost.kl_mean * 20


def test_pushes_add_up_in_the_stream_alone(push):
    same = [torch.zeros(2, 3)]
    # α = μ/√4: 4 and 5, at right angles.
    assert measure_cost(same, same, push, "attn_out").accumulated == pytest.approx(
        math.hypot(4, 5) / 10
    )
    assert measure_cost(same, same, push, "attn_in").accumulated is None


def cost_of(kl_p95):
    return Cost(kl_mean=kl_p95 / 3, kl_p95=kl_p95, top1_agreement=0.5, accumulated=None, tokens=9)


@pytest.mark.parametrize("kl", [LEAST_KL, 0.3, MOST_KL])
def test_a_cost_within_bounds_says_nothing(kl):
    assert cost_of(kl).warn(1.0) is None


@pytest.mark.parametrize(
    ("multiplier", "kl", "remedy"),
    [(1.0, 2.8, "|m| ≤ 0.5"), (-2.0, 4.0, "|m| ≤ 1"), (1.0, 400.0, "|m| ≤ 0.05")],
)
def test_a_push_that_costs_too_much_says_what_to_try(multiplier, kl, remedy):
    warning = cost_of(kl).warn(multiplier)
    assert f"m = {multiplier:g} moves neutral text by {kl:g} nats" in warning
    assert warning.endswith(f"try -m auto, or {remedy}")
    assert "\n" not in warning


def test_a_push_that_moves_nothing_says_so():
    assert "hardly moves neutral text" in cost_of(0.003).warn(0.1)


def test_a_cost_that_is_no_number_is_no_good_cost():
    assert cost_of(math.inf).warn(1.0)
