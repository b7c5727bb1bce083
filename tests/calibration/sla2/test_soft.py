"""The soft choice: its rows sum to the budget, it hardens into the highest, its derivative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_opt.calibration.sla2.compare import keep_highest, straight_through
from turbo_opt.calibration.sla2.soft import soft_topk


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 4),
    count=st.integers(1, 40),
    share=st.floats(0.01, 1),
    temperature=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_every_row_sums_to_the_budget(rows, count, share, temperature, spread, seed):
    torch.manual_seed(seed)
    scores = spread * torch.randn(rows, count, dtype=torch.float64)
    budget = max(1, int(share * count))
    chosen = soft_topk(scores, budget, temperature)
    assert ((chosen >= 0) & (chosen <= 1)).all()
    torch.testing.assert_close(chosen.sum(-1), torch.full((rows,), float(budget)).double())
    order = scores.argsort(-1)
    assert (chosen.gather(-1, order).diff(dim=-1) >= -1e-12).all()


def test_equal_scores_share_the_budget_evenly():
    torch.testing.assert_close(soft_topk(torch.zeros(1, 8), 2, 0.1), torch.full((1, 8), 0.25))


def test_it_is_what_the_formula_gives_with_the_right_lambda():
    scores = torch.tensor([[0.3, -0.2, 0.1, 0.5]], dtype=torch.float64)
    chosen = soft_topk(scores, 2, 0.1)
    offset = chosen.logit() - scores / 0.1
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset))


def test_a_low_temperature_chooses_the_highest():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 12)
    softer = (soft_topk(scores, 3, t) - keep_highest(scores, 3) for t in (1.0, 0.1, 1e-4))
    errors = [difference.abs().max().item() for difference in softer]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-6


def test_the_gradient_is_that_of_the_constrained_choice():
    torch.manual_seed(0)
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_topk(x, 2, 0.5), (scores,))


@pytest.mark.parametrize("scores", [torch.tensor([[9e3, -9e3, 0.0]]), torch.zeros(1, 3)])
def test_saturated_rows_have_finite_gradients(scores):
    scores = scores.requires_grad_()
    (soft_topk(scores, 1, 0.1) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert scores.grad.isfinite().all()


def test_straight_through_has_the_value_of_the_hard_choice_and_the_derivative_of_the_soft():
    torch.manual_seed(0)
    scores, grad = torch.randn(2, 3, 9, requires_grad=True), torch.randn(2, 3, 9)
    chosen = straight_through(scores, 4, 0.1)
    assert torch.equal(chosen.detach(), keep_highest(scores.detach(), 4))
    (mine,) = torch.autograd.grad(chosen, scores, grad)
    (soft,) = torch.autograd.grad(soft_topk(scores, 4, 0.1), scores, grad)
    assert torch.equal(mine, soft) and mine.any()


def test_the_whole_budget_chooses_everything_and_learns_nothing():
    scores = torch.randn(2, 3, requires_grad=True)
    chosen = soft_topk(scores, 3, 0.1)
    assert torch.equal(chosen, torch.ones(2, 3)) and not chosen.requires_grad
