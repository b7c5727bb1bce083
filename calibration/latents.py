"""Latents of a Wan VAE as the denoiser sees them, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """(B, C, F, H, W) with zero mean and unit variance per channel, by the VAE's own statistics."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
