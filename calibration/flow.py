"""Rectified flow as the denoisers are trained: noise levels, noisy latents, timesteps.

x_t = (1 − t)·x₀ + t·ε        the network predicts ε − x₀ from x_t and 1000·t
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.batches import Batch
from turbo_opt.calibration.jobs.schema import Noise
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.errors import BadInput
from turbo_opt.json_files import read_json

BOUNDARY = "boundary_ratio"
"""In a model_index.json: the noise level at which the other of two experts takes over."""


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels in [low, high], uniform before t ← s·t / (1 + (s − 1)·t)."""

    shift: float
    low: float
    high: float

    @classmethod
    def of(cls, settings: Noise, folder: DenoiserFolder) -> NoiseLevels:
        """As a job says; what it leaves open is the model's own.

        Raises:
            BadInput: see `settled`.
        """
        noise = settled(settings, folder)
        assert noise.low is not None and noise.high is not None
        return cls(noise.shift or flow_shift(folder.pipeline.path), noise.low, noise.high)

    def at(self, u: Tensor) -> Tensor:
        """t for u in [0, 1], evenly spread before the shift."""
        low, high = (t / (self.shift - (self.shift - 1) * t) for t in (self.low, self.high))
        even = low + (high - low) * u
        return self.shift * even / (1 + (self.shift - 1) * even)


def settled(noise: Noise, folder: DenoiserFolder) -> Noise:
    """A job's noise levels with both ends: those it leaves open are where the denoiser is used.

    Raises:
        BadInput: nothing is left between them, or the model's boundary is none.
    """
    lowest, highest = expert_range(folder)
    low = lowest if noise.low is None else noise.low
    high = highest if noise.high is None else noise.high
    if low >= high:
        raise BadInput(
            f"noise: low {low:g} must be below high {high:g}; {folder.path} is used at noise "
            f"levels from {lowest:g} to {highest:g}"
        )
    return noise.model_copy(update={"low": low, "high": high})


def expert_range(folder: DenoiserFolder) -> tuple[float, float]:
    """Lowest and highest noise level of a denoiser: an expert's side of the boundary, else all.

    Raises:
        BadInput: see `boundary_of`.
    """
    boundary = boundary_of(folder)
    if boundary is None:
        return 0.0, 1.0
    return (boundary, 1.0) if folder.name == "transformer" else (0.0, boundary)


def boundary_of(folder: DenoiserFolder) -> float | None:
    """The noise level between a denoiser and the other expert; None if its model says none.

    Raises:
        BadInput: what it says is no noise level.
    """
    boundary = folder.pipeline.components.pipeline_config.get(BOUNDARY)
    if boundary is None or len(folder.pipeline.denoisers) == 1:
        return None
    if not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise BadInput(
            f"{folder.pipeline.path / 'model_index.json'}: {BOUNDARY} is {boundary!r}, must be "
            "between 0 and 1"
        )
    return float(boundary)


def flow_shift(pipeline: Path) -> float:
    """The shift that a pipeline's scheduler samples with; 1 if it has none."""
    config = read_json(pipeline / "scheduler" / "scheduler_config.json")
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def noisy(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of latents (B, …) at noise levels t (B,)."""
    level = t.view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents, noise, level)


class Denoiser:
    """A diffusers denoiser as a function of x, t and text.

    Args:
        network: with diffusers' call.
        folder: where it came from.
    """

    def __init__(self, network: nn.Module, folder: DenoiserFolder) -> None:
        self.network = network
        self._patch = tuple(folder.config["patch_size"])
        self._per_token = bool(folder.pipeline.components.pipeline_config.get("expand_timesteps"))

    def __call__(self, x: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The predicted velocity, (B, C, F, H, W) float32.

        Args:
            x: (B, C, F, H, W).
            t: (B,) in [0, 1].
            prompt_embeds: (B, T, C_text).
        """
        timestep = 1000.0 * t.float()
        if self._per_token:
            sides = zip(x.shape[2:], self._patch, strict=True)
            tokens = math.prod(side // size for side, size in sides)
            timestep = timestep[:, None].expand(-1, tokens)
        return self.network(x, timestep, prompt_embeds, return_dict=False)[0].float()


def distance_to_noise(denoiser: Denoiser, batch: Batch) -> Tensor:
    """Mean square of the difference between a prediction and noise that it knows nothing of.

    Whatever the network has learned, it is about the prediction's own mean square and 1, so that
    its gradient is no small difference of large values.
    """
    t = batch.uniform("probe level")
    x = noisy(batch.latents, batch.noise("probe noise"), t)
    prediction = denoiser(x, t, batch.prompt_embeds)
    return (prediction - batch.noise("probe target")).square().mean()


class Sampled:
    """A network as the sampling loop calls it: by autocast, while the sampler stays in float32."""

    def __init__(self, network: nn.Module, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.dtype = torch.float32
        self.config = config
        self._network, self._compute = network, dtype

    def __call__(self, hidden_states: Tensor, **inputs: Any) -> Any:
        """See the network."""
        with autocast(hidden_states.device, self._compute):
            return self._network(hidden_states, **inputs)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Products in `dtype`; float32 changes nothing.

    What is cast is not kept: until the end it would be the whole network, however it is sharded.
    """
    enabled = dtype is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextmanager
def tensor_float() -> Iterator[None]:
    """Float32 products in TF32 where a GPU has it. The setting is torch's, so it is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
