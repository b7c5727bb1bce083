"""Weights of a trained model's scale, without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.forward.cases import HEAD_DIM


def random_weights(
    like: Mapping[str, Tensor], tables: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """A tensor for each name of `like` (meta tensors), by one seed; `tables` are taken as given.

    Matrices have variance 1/fan-in; gains are about one and biases about zero.
    """
    generator = torch.Generator(device).manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, meta in like.items():
        if name in tables:
            weights[name] = tables[name].to(device)
            continue
        tensor = torch.empty(meta.shape, dtype=meta.dtype, device=device)
        if meta.ndim > 1:
            fan_in = meta[0].numel() if meta.ndim != 3 else meta.shape[-1]
            tensor.normal_(0, fan_in**-0.5, generator=generator)
        else:
            mean = 1 if "norm" in name and "weight" in name else 0
            tensor.normal_(mean, 0.02, generator=generator)
        weights[name] = tensor
    return weights


def random_projections(layers: int, device: torch.device) -> dict[str, Tensor]:
    """What a checkpoint tuned for sparse-linear attention holds besides: proj_l, float32."""
    generator = torch.Generator(device).manual_seed(1)
    weights: dict[str, Tensor] = {}
    for layer in range(layers):
        for leaf, shape in (("weight", (HEAD_DIM, HEAD_DIM)), ("bias", (HEAD_DIM,))):
            tensor = torch.empty(shape, device=device)
            tensor.normal_(0, 0.02, generator=generator)
            weights[f"blocks.{layer}.attn1.proj_l.{leaf}"] = tensor
    return weights
