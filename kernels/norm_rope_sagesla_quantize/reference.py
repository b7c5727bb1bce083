"""The definition of norm_rope_sagesla_quantize: attention's result in float32, quantized."""

from __future__ import annotations

from typing import Any

import torch

from ..block_quantize.reference import quantize_activation
from ..norm_rope_sagesla.reference import norm_rope_sagesla_in_float


def norm_rope_sagesla_quantize(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *attention, scheme = arguments
    return quantize_activation(norm_rope_sagesla_in_float(*attention), scheme)
