"""The losses of rCM: consistency forward, distribution matching in reverse. Pure functions.

x, F and clips are (B, …), angles τ (B,), losses (B,): sums over all but the batch, in float64. What
is a target must come without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbo_opt.calibration.rcm.trigflow import sides

NORMALIZER = 0.1
"""c of g / (‖g‖ + c); sCM, arXiv 2410.11081, §4."""
_LEAST_DISTANCE = 1e-5


def consistency_tangent(
    x: Tensor, angle: Tensor, flow: Tensor, teacher: Tensor, tangent: Tensor, warm_up: float
) -> Tensor:
    """g, the direction in which F makes f(x, τ) = cos τ·x − sin τ·F constant on the path.

        g = −cos τ·√(1 − r²·sin² τ)·(F − F_teacher) − r·(cos τ·sin τ·x + t_F)

    At r = 1 it is cos τ·df/dτ, which vanishes where f is consistent; at r = 0 it pulls F to the
    teacher's, so a student that starts as its teacher starts without a jolt. Sources: sCM, arXiv
    2410.11081, §4 (cos² τ in place of the root's factor); rCM, arXiv 2510.08431.

    Args:
        flow, teacher: the student's F and the teacher's.
        tangent: t_F, see `turbo_opt.calibration.rcm.tangents`.
        warm_up: r in [0, 1].
    """
    cos, sin = sides(angle, x)
    pull = cos * torch.sqrt(1 - (warm_up * sin) ** 2) * (flow - teacher)
    return -pull - warm_up * (cos * sin * x + tangent)


def continuous_consistency(flow: Tensor, direction: Tensor) -> Tensor:
    """‖F − sg(F) − g / (‖g‖ + 0.1)‖², whose gradient is −2·g / (‖g‖ + 0.1): sCM.

    Args:
        flow: the student's F, with gradient.
        direction: g.
    """
    norm = _per_sample(direction.double().square()).sqrt()
    shape = (-1, *[1] * (direction.ndim - 1))
    step = direction / (norm + NORMALIZER).view(shape)
    return _per_sample((flow - flow.detach() - step).square())


def discrete_consistency(clean: Tensor, neighbour: Tensor) -> Tensor:
    """‖f(x, τ) − sg f(x', τ − Δ)‖², x and x' neighbours on the teacher's path: dCM.

    Source: consistency distillation, arXiv 2303.01469, §4, in TrigFlow.

    Args:
        clean: f(x, τ), with gradient.
        neighbour: f(x', τ − Δ).
    """
    return _per_sample((clean - neighbour.detach()).square())


def distribution_matching(clean: Tensor, fake: Tensor, teacher: Tensor) -> Tensor:
    """A loss whose gradient is 2·(x₀_fake − x₀_teacher) / mean|x₀ − x₀_teacher|: DMD.

    The difference of two denoised clips is that of two scores, up to a factor of the noise level;
    the divisor makes all noise levels count alike. Sources: DMD, arXiv 2311.18828, eq. 7 and 8;
    DMD2, arXiv 2405.14867.

    Args:
        clean: x₀, the student's sample, with gradient.
        fake, teacher: what the fake score and the guided teacher denoise a noisy x₀ to.
    """
    apart = (clean.detach() - teacher).abs().flatten(1).mean(1).clamp_min(_LEAST_DISTANCE)
    step = (fake - teacher) / apart.view(-1, *[1] * (clean.ndim - 1))
    return _per_sample((clean - (clean - step).detach()).square())


def flow_matching(flow: Tensor, target: Tensor) -> Tensor:
    """‖F − (cos τ·ε − sin τ·x₀)‖², which teaches the fake score the student's samples.

    It is their denoising error over sin² τ. Source: DMD2, arXiv 2405.14867, §4.2; the weight is
    that of rCM, arXiv 2510.08431.
    """
    return _per_sample((flow - target).square())


def _per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
