"""One network that is trained: its optimizer and its moving average, as tensors to be saved."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from turbo_opt.calibration.jobs.schema import Training
from turbo_opt.calibration.networks import whole

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainee:
    """A network with AdamW and, if the job keeps one, an average of its weights.

    Attributes:
        network: in float32; sharded or not.
        parameters: those that are trained, by name.
        average: their moving average, or None.
        rate_scale: what the loop's learning rate is multiplied by.
    """

    def __init__(self, network: nn.Module, settings: Training, *, averaged: bool = True) -> None:
        self.network = network
        self._settings = settings
        self.rate_scale = 1.0
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.average: dict[str, Tensor] | None = None
        if averaged and settings.average is not None:
            self.average = {n: p.detach().clone() for n, p in self.parameters.items()}
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        on_gpu = any(p.is_cuda for p in self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=settings.betas,
            fused=on_gpu,
        )
        for parameter in self.parameters.values():
            device = parameter.device if on_gpu else torch.device("cpu")
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=device),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
        self._updates = torch.zeros(())

    def gradient(self) -> dict[str, Tensor]:
        """By parameter, where there is one; not a copy."""
        return {n: p.grad for n, p in self.parameters.items() if p.grad is not None}

    def clip_gradient(self) -> float:
        """Limit the norm of the gradient; returns the norm before. Not finite is not clipped."""
        norm = torch.nn.utils.get_total_norm(list(self.gradient().values()))
        value = float(whole(norm))
        if math.isfinite(value):
            torch.nn.utils.clip_grads_with_norm_(
                list(self.parameters.values()), self._settings.gradient_clip, norm
            )
        return value

    def gradients_not_finite(self) -> list[str]:
        """Names of the parameters whose gradients are not finite; all processes must call."""
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and not whole(parameter.grad).isfinite().all()
        ]

    def update(self, rate: float) -> None:
        """One step of the optimizer and of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.rate_scale
        self.optimizer.step()
        self._updates += 1
        if self.average is None or self._settings.average is None:
            return
        count = float(self._updates)
        # An average that remembers its start only as long as it is short.
        decay = min(self._settings.average, (1 + count) / (10 + count))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()), list(self.parameters.values()), 1 - decay
            )

    def forget_gradient(self) -> None:
        """Free the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def is_finite(self) -> bool:
        """Whether all that `tensors` holds is; all processes must call.

        Weights whose squares have no finite sum count as none, long before they are infinite. The
        moments are finite, as the gradients' norms were.
        """
        return all(
            math.isfinite(norm_of(values)) for values in (self.parameters, self.average or {})
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that has to be saved, by name; loading writes into these very tensors."""
        found = {f"model.{n}": p.detach() for n, p in self.network.named_parameters()}
        for name, value in (self.average or {}).items():
            found[f"average.{name}"] = value
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                found[f"adamw.{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return {**found, "adamw.updates": self._updates}

    def loaded(self) -> None:
        """The tensors have been written to: tell the optimizer how many updates there were."""
        for state in self.optimizer.state.values():
            state["step"].fill_(float(self._updates))

    @contextlib.contextmanager
    def averaged(self, wanted: bool = True) -> Iterator[None]:
        """Within the context the network has its averaged weights, if an average is kept."""
        if not wanted or self.average is None:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(kept)

    def _write(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    """Of all together; all processes must call."""
    values = [tensor.detach() for tensor in tensors.values()]
    return float(whole(torch.nn.utils.get_total_norm(values)))
