"""Other dense models that what a tuning learns shall fit as well.

`merge-weights` adds the difference Δ = student − teacher to a model that was trained for something
else, such as a distilled one. Nothing in the tuning of Δ makes that work: it has only seen the
teacher. A companion is such a model: every other step trains the same Δ by

    ‖sparse(companion + Δ) − dense(companion)‖²

so that one file of weights makes both models sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turbo_opt.calibration.flow import Denoiser, NoiseLevels


@dataclass(frozen=True)
class Companion:
    """One of these models.

    Attributes:
        dense: frozen; what is imitated.
        sparse: a network like the student's, which has the weights companion + Δ in its steps; what
            reaches it as a gradient is the student's.
        levels: which noise levels are trained.
    """

    dense: Denoiser
    sparse: Denoiser
    levels: NoiseLevels

    def lead(self, student: nn.Module) -> None:
        """Give gradients of `sparse` to the student's parameters from now on."""
        for name, parameter in self.sparse.network.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_giving(student.get_parameter(name)))

    @torch.no_grad()
    def follow(self, student: nn.Module, teacher: nn.Module) -> None:
        """Set the weights of `sparse` to companion + (student − teacher)."""
        bases = dict(teacher.named_parameters())
        own = dict(self.dense.network.named_parameters())
        for name, parameter in self.sparse.network.named_parameters():
            parameter.copy_(student.get_parameter(name))
            if name in bases:  # all but what the tuning adds
                parameter.add_(own[name]).sub_(bases[name])


def _giving(target: nn.Parameter) -> Callable[[Tensor], None]:
    def give(parameter: Tensor) -> None:
        assert parameter.grad is not None
        target.grad = parameter.grad if target.grad is None else target.grad + parameter.grad
        parameter.grad = None

    return give
