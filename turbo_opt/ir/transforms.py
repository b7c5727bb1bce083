"""Weight transforms that passes record: see `turbo_opt.ir.weights.Transform`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turbo_opt.ir.weights import LazyTensor, Transform, apply, cast, constant, register_transform


def block_quantized(weight: LazyTensor, scheme: str) -> tuple[LazyTensor, LazyTensor]:
    """(values, scales) of `weight` (out, in) quantized in 128×128 blocks by `scheme`.

    values has the weight's shape in the scheme's dtype; scales is float32,
    (ceil(out/128), ceil(in/128)). A weight that was read from such blocks gives them back as they
    are, also where it was rounded to the graph's dtype in between.
    """
    from turbo_opt.kernels.schemes import SCHEMES

    source = weight.inputs[0] if weight.op == "cast" else weight
    if source.op == "block-dequantize":
        values, scales = source.inputs
        if values.dtype == SCHEMES[scheme].dtype:
            return values, cast(scales, torch.float32)
    values, scales = apply("block-quantize", weight, scheme=scheme)
    return values, scales


def block_dequantized(values: LazyTensor, scales: LazyTensor) -> LazyTensor:
    """What (out, in) `values` in 128×128 blocks stand for, float32.

    Args:
        scales: (ceil(out/128), ceil(in/128)), one for each block.
    """
    return apply("block-dequantize", values, scales)[0]


def scaled(values: LazyTensor, scale: LazyTensor | None = None) -> LazyTensor:
    """`values` (out, …), in 8 bits, in float32.

    Args:
        scale: what they are multiplied by: one number, or (out,) or (out, 1), one for each row.
    """
    if scale is None:
        return cast(values, torch.float32)
    return apply("cast-scaled", values, scale)[0]


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


def reshaped(tensor: LazyTensor, shape: Sequence[int]) -> LazyTensor:
    """`tensor` with its trailing axes arranged anew; axis 0 stays.

    Raises:
        ValueError: `shape` has another first side or another number of elements.
    """
    if tensor.shape == tuple(shape):
        return tensor
    if tensor.shape[:1] != tuple(shape[:1]) or math.prod(tensor.shape) != math.prod(shape):
        raise ValueError(f"{list(tensor.shape)} cannot be arranged as {list(shape)}")
    return apply("reshape", tensor, shape=list(shape))[0]


def columns_times(weight: LazyTensor, factor: Tensor) -> LazyTensor:
    """`weight` (…, in) with each column, or a vector with each value, multiplied by its factor.

    Args:
        factor: (in,) powers of two, so that nothing is rounded.
    """
    name = "columns-times" if len(weight.shape) > 1 else "times"
    return apply(name, weight, constant(factor.to(weight.dtype)))[0]


def unrounded(tensor: LazyTensor) -> LazyTensor:
    """`tensor` in float32, before it was rounded to fewer bits if a cast was the last thing done.

    Sums that are recorded one after the other so round once, at their end.
    """
    source = tensor.inputs[0] if tensor.op == "cast" else tensor
    return cast(source, torch.float32)


def plus_difference(
    base: LazyTensor, target: LazyTensor, reference: LazyTensor, weight: float
) -> LazyTensor:
    """base + weight·(target − reference), float32; all of one shape.

    Args:
        base: float32.
    """
    return apply("plus-difference", base, target, reference, weight=weight)[0]


def plus_scaled(base: LazyTensor, change: LazyTensor, scale: float) -> LazyTensor:
    """base + scale·change, float32; both of one shape.

    Args:
        base: float32.
    """
    return apply("plus-scaled", base, change, scale=scale)[0]


def plus_low_rank(base: LazyTensor, up: LazyTensor, down: LazyTensor, scale: float) -> LazyTensor:
    """base + scale·(up · down), float32, with all axes but the first of each taken as one.

    Args:
        base: (out, …) float32.
        up: (out, rank, …) whose further sides are 1.
        down: (rank, …).
    """
    return apply("plus-low-rank", base, up, down, scale=scale)[0]


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


def _dequantize(values: Tensor, scales: Tensor) -> Sequence[Tensor]:
    # A band of blocks at a time: twice the result would be 0.6 GB for the largest layers.
    found = torch.empty(values.shape)
    for band, row in zip(found.split(128), scales.float(), strict=True):
        band.copy_(row.repeat_interleave(128)[: values.shape[1]].expand_as(band))
    return [found.mul_(values)]


def _cast_scaled(values: Tensor, scale: Tensor) -> Sequence[Tensor]:
    sides = [-1] + [1] * (values.ndim - 1) if scale.numel() > 1 else []
    return [values.float() * scale.float().reshape(sides)]


def _infer_joined(*parts: LazyTensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    rows = sum(part.shape[0] for part in parts)
    return [((rows, *parts[0].shape[1:]), parts[0].dtype)]


register_transform(Transform("block-quantize", _infer, _compute, rows=128))
register_transform(
    Transform("block-dequantize", lambda x, scales: [(x.shape, torch.float32)], _dequantize)
)
register_transform(
    Transform("cast-scaled", lambda x, scale: [(x.shape, torch.float32)], _cast_scaled)
)
register_transform(
    Transform("concatenate", _infer_joined, lambda *parts: [torch.cat(parts)], concatenates=True)
)
for _name, _rows in (("columns-times", 1), ("times", None)):
    register_transform(
        Transform(
            _name,
            infer=lambda x, factor: [(x.shape, x.dtype)],
            compute=lambda x, factor: [x * factor],
            rows=_rows,
            by_rows=1,
        )
    )
register_transform(
    Transform(
        "reshape",
        infer=lambda x, shape: [(tuple(shape), x.dtype)],
        compute=lambda x, shape: [x.reshape(len(x), *shape[1:])],
        rows=1,
    )
)
register_transform(
    Transform(
        "plus-difference",
        infer=lambda base, target, reference, weight: [(base.shape, base.dtype)],
        compute=lambda base, target, reference, weight: [
            base + weight * (target.float() - reference.float())
        ],
        rows=1,
    )
)
register_transform(
    Transform(
        "plus-scaled",
        infer=lambda base, change, scale: [(base.shape, base.dtype)],
        compute=lambda base, change, scale: [base + scale * change.float()],
        rows=1,
    )
)
register_transform(
    Transform(
        "plus-low-rank",
        infer=lambda base, up, down, scale: [(base.shape, base.dtype)],
        compute=lambda base, up, down, scale: [
            base + scale * (up.float().flatten(1) @ down.float().flatten(1)).reshape(base.shape)
        ],
        rows=1,
        by_rows=2,
    )
)
