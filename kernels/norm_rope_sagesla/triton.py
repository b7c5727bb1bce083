"""norm_rope_sagesla by the kernels of _triton/attention."""

from __future__ import annotations

import torch

from .._triton.attention.launch import Blocks, Projection, Rotation, sparse_linear_attention
from ..sparse_rules import as_heads


def norm_rope_sagesla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    proj_weight: torch.Tensor | None,
    proj_bias: torch.Tensor | None,
    topk: float,
    block_q: int,
    block_k: int,
    feature_map: str,
    pv: str,
    cuda: bool = False,
) -> torch.Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    head_dim = 2 * cos.shape[-1]
    projection = None if proj_weight is None else Projection(proj_weight, proj_bias, feature_map)
    q_BHLD, k_BHLD, v_BHLD, o_BHLD = (as_heads(x, head_dim) for x in (q, k, v, o))
    sparse_linear_attention(
        q_BHLD, k_BHLD, v_BHLD, o_BHLD, Blocks(topk, block_q, block_k),
        rotation=Rotation(q_weight, k_weight, cos, sin, eps),
        projection=projection, int8=True, fp8=pv == "fp8", cuda=cuda,
    )  # fmt: skip
    return o
