"""What a step does with a prediction.

Rectified flow: x_t = (1 − t)·x₀ + t·ε, and the network predicts v = ε − x₀. One step t → t′:

euler     x ← x + (t′ − t)·v                                float32
rcm-ode   x ← x − (t − t′)·v                                float64
rcm-sde   x ← (1 − t′)·(x − t·v) + t′·ε′,  ε′ ~ N(0, 1)     float64   (rCM, arXiv 2510.08431)
guidance  v ← v(negative prompt) + s·(v(prompt) − v(negative prompt))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbo_opt.ir.schedule import Step


def drawn_noise(step: Step, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
    """Unit noise of the shape of `x` that a step adds, where the generator lives; None if none."""
    if step.rule != "rcm-sde" or step.next_time == 0:
        return None
    where = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=where)


def advance(step: Step, v: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
    """x after one step of a rule of ours; float64 for the rCM rules, else float32.

    Args:
        v: the network's prediction at `step.time`.
        noise: what `drawn_noise` gave for this step.
    """
    if step.rule == "euler":
        return x.float() + (step.next_time - step.time) * v.float()
    x, v = x.double(), v.double()
    if step.rule == "rcm-ode":
        return x - (step.time - step.next_time) * v
    clean = x - step.time * v
    if noise is None:
        return clean
    return (1 - step.next_time) * clean + step.next_time * noise.to(x)


def guided(predictions: Sequence[Tensor], guidance_scale: float | None) -> Tensor:
    """A step's velocity from the prediction for the prompt and, where it is guided, that for the
    negative prompt."""
    if guidance_scale is None:
        (conditional,) = predictions
        return conditional
    conditional, unconditional = predictions
    return unconditional + guidance_scale * (conditional - unconditional)
