"""quantize_activation as one read of x and one write of q."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_tiles
from ..schemes import SCHEMES


def quantize_activation(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_tiles(x, SCHEMES[scheme])
