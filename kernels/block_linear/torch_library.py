"""block_linear by torch's own library calls: scaled_mm (fp8, Hopper) and _int_mm (int8, CPU)."""

from __future__ import annotations

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from ..schemes import BLOCK

SCALE_ROWS_MULTIPLE = 4  # cuBLASLt reads 128×128 scales along K four at a time


def block_linear(
    q: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    scheme: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    multiply = _by_scaled_mm if scheme == "fp8-block" else _by_int_mm
    y_shape = (*q.shape[:-1], weight.shape[0])
    if q.numel() == 0:
        return q.new_empty(y_shape, dtype=dtype)
    q_MK = q.reshape(-1, q.shape[-1])
    return multiply(q_MK, q_scale, weight, weight_scale, bias, dtype).reshape(y_shape)


def _by_scaled_mm(
    q_MK: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return scaled_mm(
        q_MK.contiguous(),
        weight.contiguous().t(),
        scale_a=q_scale.t().contiguous().t(),  # strides (1, M): no copy if it comes like that
        scale_recipe_a=ScalingType.BlockWise1x128,
        scale_b=_weight_scale_for_scaled_mm(weight_scale),
        scale_recipe_b=ScalingType.BlockWise128x128,
        bias=bias if bias is None else bias.to(dtype).contiguous(),
        output_dtype=dtype,
    )


def _weight_scale_for_scaled_mm(weight_scale: torch.Tensor) -> torch.Tensor:
    """(N / 128, K / 128) row-major → (K / 128 rounded up to a multiple of 4, N / 128), stride 1."""
    missing = -weight_scale.shape[1] % SCALE_ROWS_MULTIPLE
    if missing:
        weight_scale = pad(weight_scale, (0, missing))
    return weight_scale.contiguous().t()


def _by_int_mm(
    q_MK: torch.Tensor,
    q_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    tokens, in_features = q_MK.shape
    out_features = weight.shape[0]
    y_MN = torch.zeros((tokens, out_features), device=q_MK.device)
    token_scale_MG = q_scale.repeat_interleave(BLOCK, dim=0)[:tokens]
    weight_scale_NG = weight_scale.repeat_interleave(BLOCK, dim=0)[:out_features]
    for group, start in enumerate(range(0, in_features, BLOCK)):
        block = slice(start, start + BLOCK)
        sums_MN = torch._int_mm(q_MK[:, block], weight[:, block].t())
        y_MN.addcmul_(sums_MN * token_scale_MG[:, group, None], weight_scale_NG[:, group])
    if bias is not None:
        y_MN += bias
    return y_MN.to(dtype)
