"""TrigFlow, in which consistency is written, and the rectified flow that denoisers are trained in.

    TrigFlow          x = cos τ·x₀ + sin τ·ε       F = dx/dτ = cos τ·ε − sin τ·x₀
    rectified flow    y = (1 − t)·x₀ + t·ε         v = dy/dt = ε − x₀

Both are one path at another scale: with t = sin τ / (cos τ + sin τ), y = x / (cos τ + sin τ). From
a prediction of either kind x₀ = cos τ·x − sin τ·F = y − t·v, so

    F = ((cos τ − sin τ)·x + v) / (cos τ + sin τ)

Angles τ in [0, π/2] have shape (B,), x and F (B, …). All is computed in float64: near τ = π/2 a
float32 angle is a coarse noise level. Sources: sCM, arXiv 2410.11081, §3; rCM, arXiv 2510.08431.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(y, t, prompt_embeds) → v: a network of rectified flow; y, v (B, …) and t (B,) float32."""
Predictor = Callable[[Tensor, Tensor], Tensor]
"""(x, τ) → F, in float64."""


def angle_of(t: Tensor) -> Tensor:
    """τ of rectified-flow times t in [0, 1]."""
    t = t.double()
    return torch.atan2(t, 1 - t)


def flow_time(angle: Tensor) -> Tensor:
    """t of angles τ."""
    cos, sin = angle.double().cos(), angle.double().sin()
    return sin / (cos + sin)


def sides(angle: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos τ and sin τ, to be multiplied with x (B, …)."""
    angle = angle.double().view(-1, *[1] * (x.ndim - 1))
    return angle.cos(), angle.sin()


def noisy(clean: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """x of x₀ and ε at τ."""
    cos, sin = sides(angle, clean)
    return cos * clean.double() + sin * noise.double()


def flow_of(clean: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """F of x₀ and ε at τ."""
    cos, sin = sides(angle, clean)
    return cos * noise.double() - sin * clean.double()


def clean_of(x: Tensor, angle: Tensor, flow: Tensor) -> Tensor:
    """x₀ of a prediction: for a consistency model, its result f(x, τ)."""
    cos, sin = sides(angle, x)
    return cos * x.double() - sin * flow.double()


def turned(x: Tensor, flow: Tensor, by: Tensor) -> Tensor:
    """x at τ + `by` (B,), F taken as that of a straight path: one step of DDIM."""
    cos, sin = sides(by, x)
    return cos * x.double() + sin * flow.double()


def flow_of_velocity(x: Tensor, angle: Tensor, v: Tensor) -> Tensor:
    """F of a rectified-flow prediction v."""
    cos, sin = sides(angle, x)
    return ((cos - sin) * x.double() + v.double()) / (cos + sin)


def velocity_of_flow(x: Tensor, angle: Tensor, flow: Tensor) -> Tensor:
    """v of a TrigFlow prediction F."""
    cos, sin = sides(angle, x)
    return (cos + sin) * flow.double() - (cos - sin) * x.double()


def predictor(velocity: Velocity, prompt_embeds: Tensor) -> Predictor:
    """A network of rectified flow as a function of TrigFlow, for these prompts.

    Derivatives of both kinds pass through. The network itself is called in float32.
    """

    def predict(x: Tensor, angle: Tensor) -> Tensor:
        cos, sin = sides(angle, x)
        y, t = x.double() / (cos + sin), flow_time(angle)
        return flow_of_velocity(x, angle, velocity(y.float(), t.float(), prompt_embeds))

    return predict


def guided(velocity: Velocity, empty_prompt: Tensor, scale: float) -> Velocity:
    """Classifier-free guidance: v_∅ + scale·(v − v_∅), two evaluations; none at scale 1.

    A student that imitates it needs no guidance of its own.

    Args:
        empty_prompt: (T, C_text), embeddings of the empty prompt.
    """
    if scale == 1:
        return velocity

    def evaluate(y: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        without = velocity(y, t, empty_prompt.expand_as(prompt_embeds))
        return torch.lerp(without, velocity(y, t, prompt_embeds), scale)

    return evaluate
