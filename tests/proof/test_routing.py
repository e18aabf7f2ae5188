"""Choices of experts: recorded from one run, held in another, and what would have changed."""

from __future__ import annotations

import pytest
import torch

from bake.proof.routing import hold_choices, record_choices

SCORES = torch.tensor([[0.1, 0.5, 0.4, 0.0], [0.9, 0.2, 0.3, 0.8]])


def route(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two choices, as routers call them: by function, and by method with keywords."""
    groups = scores.topk(1, dim=-1)[0]
    values, indices = torch.topk(scores, 2, dim=-1)
    return values + groups, indices


def test_held_choices_take_the_runs_own_scores():
    with record_choices() as choices:
        route(SCORES)
    assert [tuple(chosen.shape) for chosen in choices] == [(2, 1), (2, 2)]

    moved = SCORES.clone()
    moved[0, 0] = 0.45  # Past the second of the first token.
    assert route(moved)[1].tolist() == [[1, 0], [0, 3]]
    with hold_choices(choices) as held:
        values, indices = route(moved)
    assert indices.tolist() == [[1, 2], [0, 3]]
    torch.testing.assert_close(values, torch.tensor([[1.0, 0.9], [1.8, 1.7]]))
    assert (held.choices, held.flipped, held.share, held.fits) == (4, 1, 0.25, True)


def test_another_order_of_the_same_experts_is_no_change():
    with record_choices() as choices:
        SCORES.topk(2)
    with hold_choices(choices) as held:
        torch.topk(SCORES + torch.tensor([0.0, 0.0, 0.15, 0.15]), k=2)
    assert (held.choices, held.flipped) == (2, 0)


@pytest.mark.parametrize("calls", [1, 3])
def test_other_routers_are_not_held(calls):
    with record_choices() as choices:
        route(SCORES)
    with hold_choices(choices) as held:
        for _ in range(calls):
            torch.topk(SCORES, 1)
    assert not held.fits


def test_nothing_is_recorded_without_a_router():
    with record_choices() as choices:
        SCORES.softmax(-1).argmax(-1)
    assert choices == []
