"""norm_rope_sagesla_quantize by the CUDA kernels for Hopper: attention writes e4m3 and scales."""

from __future__ import annotations

from typing import Any

import torch

from .._triton.attention.launch import Blocks, Projection, Rotation, sparse_linear_attention
from .._triton.blocks import new_quantized
from ..schemes import SCHEMES
from ..sparse_rules import as_heads


def norm_rope_sagesla_quantize(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, q_weight, k_weight, cos, sin, eps, weight, bias, *settings = arguments
    topk, block_q, block_k, feature_map, _, scheme = settings
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o, scale = new_quantized(q, SCHEMES[scheme])
    head_dim = 2 * cos.shape[-1]
    q_BHLD, k_BHLD, v_BHLD, o_BHLD = (as_heads(x, head_dim) for x in (q, k, v, o))
    sparse_linear_attention(
        q_BHLD, k_BHLD, v_BHLD, o_BHLD, Blocks(topk, block_q, block_k),
        rotation=Rotation(q_weight, k_weight, cos, sin, eps),
        projection=None if weight is None else Projection(weight, bias, feature_map),
        int8=True, fp8=True, cuda=True, o_scale=scale,
    )  # fmt: skip
    return o, scale
