"""A choice of blocks that can be differentiated: σ(s/τ + λ), λ so that each row sums to the budget.

Source: SLA2, arXiv 2602.12675, equation 17; its derivative follows from the constraint, by which
λ is a function of s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALVINGS = 60
"""Of the interval that holds λ; float64 has no more to give."""


def soft_topk(scores: Tensor, budget: float, temperature: float) -> Tensor:
    """How much of each entry of a row is chosen: in (0, 1), rows that sum to `budget`.

    As the temperature goes to 0 it becomes the choice of the `budget` highest entries.

    Args:
        scores: (…, N) floating.
        budget: 0 < budget ≤ N; at N everything is chosen.
        temperature: τ.

    Returns:
        (…, N) of scores' dtype, differentiable once in `scores`.
    """
    if budget >= scores.shape[-1]:
        return torch.ones_like(scores)
    return _SoftTopK.apply(scores, budget, temperature)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, budget: float, temperature: float) -> Tensor:
        x = scores.double() / temperature
        # At one end no entry is above budget / N, at the other none below it.
        share = torch.tensor(budget / x.shape[-1], dtype=x.dtype, device=x.device)
        low = share.logit() - x.amax(-1, keepdim=True)
        high = share.logit() - x.amin(-1, keepdim=True)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = (x + middle).sigmoid().sum(-1, keepdim=True) > budget
            high = torch.where(above, middle, high)
            low = torch.where(above, low, middle)
        chosen = (x + (low + high) / 2).sigmoid()
        ctx.save_for_backward(chosen)
        ctx.temperature = temperature
        return chosen.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Σσ' (dx + dλ) = 0 gives dλ, so the gradient loses its mean weighted by σ'."""
        (chosen,) = ctx.saved_tensors
        slope = chosen * (1 - chosen)
        total = slope.sum(-1, keepdim=True).clamp_min(torch.finfo(slope.dtype).tiny)
        exact = grad.to(slope.dtype)
        mean = (slope * exact).sum(-1, keepdim=True) / total
        return (slope * (exact - mean) / ctx.temperature).to(grad.dtype), None, None
