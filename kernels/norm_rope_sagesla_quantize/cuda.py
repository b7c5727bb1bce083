"""norm_rope_sagesla_quantize by the CUDA kernels for Hopper: attention writes e4m3 and scales."""

from __future__ import annotations

from typing import Any

import torch

from .._triton.blocks import new_quantized
from ..norm_rope_sagesla.triton import attend_into
from ..schemes import SCHEMES


def norm_rope_sagesla_quantize(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *attention, scheme = arguments
    o, scale = new_quantized(attention[0], SCHEMES[scheme])
    attend_into(o, *attention, cuda=True, o_scale=scale)
    return o, scale
