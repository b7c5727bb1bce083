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


def concatenated(*tensors: LazyTensor) -> LazyTensor:
    """`tensors` of one dtype and alike but for axis 0, one below the other.

    Parts of whole 128-row blocks that are yet to be quantized are joined before: the numbers are
    the same, and values and scales stay one computation.
    """
    first = tensors[0]
    if all(_is_quantization_like(first, tensor) for tensor in tensors):
        joined = concatenated(*(tensor.inputs[0] for tensor in tensors))
        return apply(first.op, joined, **first.attrs)[first.output]
    return apply("concatenate", *tensors)[0]


def _is_quantization_like(first: LazyTensor, tensor: LazyTensor) -> bool:
    same = (tensor.op, tensor.attrs, tensor.output) == (first.op, first.attrs, first.output)
    return same and tensor.op == "block-quantize" and tensor.inputs[0].shape[0] % 128 == 0


def _infer(weight: LazyTensor, scheme: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    from turbo_opt.kernels.schemes import SCHEMES

    rows, columns = weight.shape
    blocks = (-(-rows // 128), -(-columns // 128))
    return [(weight.shape, SCHEMES[scheme].dtype), (blocks, torch.float32)]


def _compute(weight: Tensor, scheme: str) -> Sequence[Tensor]:
    from turbo_opt.kernels.block_quantize import quantize_weight

    return quantize_weight(weight, scheme)


def _infer_joined(*parts: LazyTensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    rows = sum(part.shape[0] for part in parts)
    return [((rows, *parts[0].shape[1:]), parts[0].dtype)]


register_transform(Transform("block-quantize", _infer, _compute, rows=128))
register_transform(
    Transform("concatenate", _infer_joined, lambda *parts: [torch.cat(parts)], concatenates=True)
)
