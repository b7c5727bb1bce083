"""norm_rope_sagesla_quantize as two passes: attention in q's 16 bits, then its quantization."""

from __future__ import annotations

from typing import Any

import torch

from ..block_quantize.triton import quantize_activation
from ..norm_rope_sagesla.triton import norm_rope_sagesla


def norm_rope_sagesla_quantize(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *attention, scheme = arguments
    return quantize_activation(norm_rope_sagesla(*attention), scheme)
