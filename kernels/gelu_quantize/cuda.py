"""gelu_quantize by groups.cu."""

from __future__ import annotations

import torch

from .._cuda.rows import quantize_groups


def gelu_quantize(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_groups(x, gelu=True)
