"""gelu_quantize as one read of x and one write of its quantized form."""

from __future__ import annotations

import torch

from .._triton.blocks import quantize_tiles
from ..schemes import SCHEMES


def gelu_quantize(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_tiles(x, SCHEMES[scheme], gelu=True)
