"""The definition of gelu_quantize, in float32."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu

from ..block_quantize.reference import quantize_activation


def gelu_quantize(x: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_activation(gelu(x.float(), approximate="tanh"), scheme)
