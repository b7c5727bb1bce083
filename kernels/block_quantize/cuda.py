"""quantize_activation by groups.cu in groups of 1×128, by tiles.cu in blocks of 128×128."""

from __future__ import annotations

import torch

from .._cuda.blocks import quantize


def quantize_activation(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(x, scheme, gelu=False)
