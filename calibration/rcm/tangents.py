"""How F changes along the teacher's path: by forward-mode derivatives, or by a difference.

With dx/dτ = F_teacher, the tangent of F along the path is

    t_F = cos τ·sin τ·dF/dτ,    dF/dτ = ∂F/∂x·F_teacher + ∂F/∂τ

The factor is part of the direction, so that nothing grows near τ = 0 and π/2 (sCM, arXiv
2410.11081, §5.1). Forward mode runs the network once, with a tangent beside every activation;
attention is `turbo_opt::attention_jvp`, the rest torch's own. The difference runs it a second time,
a little earlier on the path, and needs nothing of the network:

    dF/dτ ≈ (cos h·F(x, τ) − F(x', τ − h)) / sin h,    x' = cos h·x − sin h·F_teacher

whose error is of order h, and 0 where F is that of a straight path: there F(x', τ − h) is
cos h·F + sin h·x. It is what rCM's released training has beside forward mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from turbo_opt.calibration.rcm.trigflow import Predictor, clean_of, sides, turned
from turbo_opt.calibration.sla.student import set_attention
from turbo_opt.kernels import attention_jvp


@contextlib.contextmanager
def without_gradient() -> Iterator[None]:
    """No gradients within, and none lost after.

    Autocast keeps the weights that it has cast; those cast in here have no gradient, and must not
    serve a forward that wants one.
    """
    with torch.no_grad():
        yield
    torch.clear_autocast_cache()


def tangent_by_forward_mode(
    predict: Predictor, x: Tensor, angle: Tensor, teacher: Tensor
) -> Tensor:
    """t_F; the network must attend with `attend_with_tangents`.

    Args:
        x, teacher: (B, …) x_τ and F_teacher there, float64.
        angle: (B,) float64.
    """
    cos, sin = sides(angle, x)
    factor = cos * sin
    with without_gradient(), forward_ad.dual_level():
        moving_x = forward_ad.make_dual(x, factor * teacher)
        moving_angle = forward_ad.make_dual(angle, factor.view_as(angle))
        flow, tangent = forward_ad.unpack_dual(predict(moving_x, moving_angle))
    return torch.zeros_like(flow) if tangent is None else tangent


class Neighbour(NamedTuple):
    """A place a little earlier on the teacher's path.

    Attributes:
        x: (B, …) x'.
        angle, step: (B,) τ − h, and h.
        flow: the student's F there, without gradient.
    """

    x: Tensor
    angle: Tensor
    step: Tensor
    flow: Tensor

    @property
    def clean(self) -> Tensor:
        """f(x', τ − h)."""
        return clean_of(self.x, self.angle, self.flow)


def earlier(
    predict: Predictor, x: Tensor, angle: Tensor, teacher: Tensor, step: float
) -> Neighbour:
    """The neighbour of x by h = `step`, or τ / 2 where that is less."""
    h = torch.clamp(angle / 2, max=step)
    with without_gradient():
        there = turned(x, teacher, -h)
        return Neighbour(there, angle - h, h, predict(there, angle - h))


def tangent_by_difference(x: Tensor, angle: Tensor, flow: Tensor, neighbour: Neighbour) -> Tensor:
    """t_F of the student's F at x, and of that earlier on the path."""
    cos, sin = sides(angle, x)
    cos_h, sin_h = sides(neighbour.step, x)
    return cos * sin * (cos_h * flow - neighbour.flow) / sin_h


def attend_with_tangents(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, H, L, D); where one of the three moves, so does the result."""
    (q, tq), (k, tk), (v, tv) = (forward_ad.unpack_dual(x) for x in (q, k, v))
    if tq is None and tk is None and tv is None:
        return scaled_dot_product_attention(q, k, v)
    tq = torch.zeros_like(q) if tq is None else tq
    if tk is not None or tv is not None:
        tk, tv = (torch.zeros_like(k) if t is None else t for t in (tk, tv))
    return forward_ad.make_dual(*attention_jvp(q, k, v, tq, tk, tv))


class PromptAttention:
    """A diffusers processor for Wan's attention to a prompt, by `attend_with_tangents`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of (B, L, C) to (B, Lk, C); see diffusers' WanAttnProcessor."""
        assert attention_mask is None and rotary_emb is None
        q = attn.norm_q(attn.to_q(hidden_states))
        k = attn.norm_k(attn.to_k(encoder_hidden_states))
        v = attn.to_v(encoder_hidden_states)
        # Under autocast the norm's result is float32, v what products are made in.
        heads = [x.to(v.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v)]
        o = attend_with_tangents(attn, *heads).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](o))


def carry_tangents(network: nn.Module) -> None:
    """Have a text-to-video Wan denoiser of diffusers pass tangents on through all its attention."""
    set_attention(network, attend_with_tangents)
    for block in network.blocks:  # type: ignore[union-attr]
        block.attn2.set_processor(PromptAttention())
