"""Weights that were stored in 8 bits, as the numbers they stand for, and int8 blocks written anew.

    X.int8_weight (out, in) int8, X.scale (ceil(out/128), ceil(in/128))  →  X.weight float32
    X.weight e4m3 or e5m2, X.scale_weight (), (1,) or (out, 1) if there  →  X.weight float32

The first is what TurboDiffusion's `-quant.pth` files hold, the second ComfyUI's FP8 files, which
mark themselves by a tensor `scaled_fp8` where they have scales, some of them for weights in 16
bits. What rounding took is gone; what is quantized again in int8 blocks without a change in between
keeps its integers and scales (`turbo_opt.ir.transforms.block_quantized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from turbo_opt.errors import BadInput
from turbo_opt.ir.transforms import block_dequantized, scaled
from turbo_opt.ir.weights import LazyTensor, dtype_name
from turbo_opt.kernels.schemes import blocks

_INT8, _INT8_SCALE = "int8_weight", "scale"
_WEIGHT, _FP8_SCALE, _FP8_INPUT = "weight", "scale_weight", "scale_input"
"""What the parts of a weight are called, after their layer's name."""
_FP8_MARK = "scaled_fp8"
_BLOCKS, _OF_ATTENTION = "blocks.", ("proj_l", "alpha", "proj_q", "proj_k")
"""Where the layers are that are written in 8 bits, and those of sparse attention, which are not."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def unquantized(place: Path, stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """`stored` with a floating weight in place of each quantized one and of its scales.

    Args:
        place: where they are stored, for messages.
        stored: by the names in the file, without prefix.

    Raises:
        BadInput: a scale is missing or of another shape, or a weight is in a form unknown here.
    """
    left = {name: tensor for name, tensor in stored.items() if name != _FP8_MARK}
    found: dict[str, LazyTensor] = {}
    for name in stored:
        layer, _, leaf = name.rpartition(".")
        if leaf == _INT8:
            weight = f"{layer}.{_WEIGHT}"
            if weight in stored:
                raise BadInput(f"{place}: {name!r} and {weight!r} are both the weight {weight!r}")
            found[weight] = _from_blocks(place, name, left.pop(name), _scale(place, name, left))
        elif leaf == _WEIGHT and (stored[name].dtype in _FP8 or f"{layer}.{_FP8_SCALE}" in stored):
            scale = left.pop(f"{layer}.{_FP8_SCALE}", None)
            left.pop(f"{layer}.{_FP8_INPUT}", None)
            found[name] = _from_fp8(place, name, left.pop(name), scale)
    for name, tensor in left.items():
        if tensor.dtype not in _FLOATS:
            raise BadInput(
                f"{place}: {name!r} is {dtype_name(tensor.dtype)}, so the weights are quantized in "
                "a form that is not read; those that are: TurboDiffusion's (`int8_weight` and "
                "`scale`) and ComfyUI's FP8 (`weight` and `scale_weight`)"
            )
        found[name] = tensor
    return found


def in_int8_blocks(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as TurboDiffusion's `-quant.pth` has them, from those under the original Wan's names.

    The weight (out, in) of each linear layer in the blocks, but `proj_l` and SLA2's router, becomes
    `int8_weight` and `scale` (ceil(out/128), in/128) float32, which is max(amax, 1e-8) / 128 of its
    128×128 block; weights and biases of norms become float32, all else stays.

    Raises:
        BadInput: a layer does not have a multiple of 128 inputs.
    """
    from turbo_opt.kernels.block_quantize import quantize_weight

    found: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        layer, _, leaf = name.rpartition(".")
        in_blocks = name.startswith(_BLOCKS) and leaf == _WEIGHT
        if in_blocks and value.ndim == 2 and layer.rpartition(".")[2] not in _OF_ATTENTION:
            if value.shape[1] % 128:
                raise BadInput(
                    f"{name!r} has {value.shape[1]} inputs; int8 blocks take a multiple of 128"
                )
            quantized, scales = quantize_weight(value, "int8-block")
            found[f"{layer}.{_INT8}"], found[f"{layer}.{_INT8_SCALE}"] = quantized, scales
        else:
            of_norm = name.startswith(_BLOCKS) and layer.rpartition(".")[2].startswith("norm")
            found[name] = value.float() if of_norm else value
    return found


def _scale(place: Path, name: str, left: dict[str, LazyTensor]) -> LazyTensor:
    scale_name = f"{name.removesuffix(_INT8)}{_INT8_SCALE}"
    if scale_name not in left:
        raise BadInput(f"{place}: {name!r} has no {scale_name!r} beside it")
    return left.pop(scale_name)


def _from_blocks(place: Path, name: str, values: LazyTensor, scales: LazyTensor) -> LazyTensor:
    if values.dtype != torch.int8 or len(values.shape) != 2:
        raise BadInput(
            f"{place}: {name!r} is {dtype_name(values.dtype)} of shape {list(values.shape)}; "
            "weights in blocks are int8 (out, in)"
        )
    expected = tuple(blocks(side) for side in values.shape)
    if scales.shape != expected or scales.dtype not in _FLOATS:
        raise BadInput(
            f"{place}: the scales of {name!r} are {dtype_name(scales.dtype)} of shape "
            f"{list(scales.shape)}; {list(values.shape)} in blocks of 128×128 has "
            f"{list(expected)}, in floating point"
        )
    return block_dequantized(values, scales)


def _from_fp8(place: Path, name: str, values: LazyTensor, scale: LazyTensor | None) -> LazyTensor:
    if scale is None:
        return scaled(values)
    rows = values.shape[:1]
    if scale.dtype not in _FLOATS or scale.shape not in ((), (1,), rows, (*rows, 1)):
        raise BadInput(
            f"{place}: the scale of {name!r} is {dtype_name(scale.dtype)} of shape "
            f"{list(scale.shape)}; one number, or one for each of {values.shape[0]} rows, was "
            "expected"
        )
    return scaled(values, scale)
