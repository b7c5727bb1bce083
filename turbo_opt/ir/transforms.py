"""Weight transforms that passes record: see `turbo_opt.ir.weights.Transform`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbo_opt.ir.weights import LazyTensor, Transform, apply, register_transform


def block_quantized(weight: LazyTensor, scheme: str) -> tuple[LazyTensor, LazyTensor]:
    """(values, scales) of `weight` (out, in) quantized in 128×128 blocks by `scheme`.

    values has the weight's shape in the scheme's dtype; scales is float32,
    (ceil(out/128), ceil(in/128)).
    """
    values, scales = apply("block-quantize", weight, scheme=scheme)
    return values, scales


def _infer(weight: LazyTensor, scheme: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    from turbo_opt.kernels.schemes import SCHEMES

    rows, columns = weight.shape
    blocks = (-(-rows // 128), -(-columns // 128))
    return [(weight.shape, SCHEMES[scheme].dtype), (blocks, torch.float32)]


def _compute(weight: Tensor, scheme: str) -> Sequence[Tensor]:
    from turbo_opt.kernels.block_quantize import quantize_weight

    return quantize_weight(weight, scheme)


register_transform(Transform("block-quantize", _infer, _compute))
