"""Launch linear.cu: fp8 linear layers with block scales, and what follows them, on Hopper."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..capability import Capability, multiprocessors
from ..schemes import BLOCK
from .compiler import Long, load_kernel
from .tensor_map import TensorMap, encode

BF16, GELU_QUANTIZED, GATED_RESIDUAL = range(3)  # epilogues
_KINDS = {None: 0, torch.float32: 1, torch.bfloat16: 2}  # of bias and gate
_ALIGNMENT = 1024  # of a tile in shared memory
_HALF = 64  # rows of one product of a warpgroup


class Variant(NamedTuple):
    """How a tile is shared out; see linear.cu. The fields are its macros."""

    cluster: int
    consumers: int
    halves: int
    stages: int

    @property
    def rows(self) -> int:
        """Of a tile."""
        return self.consumers * self.halves * _HALF

    @property
    def shared_bytes(self) -> int:
        return _ALIGNMENT + self.stages * (self.rows + BLOCK) * BLOCK

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)


VARIANT = Variant(cluster=2, consumers=2, halves=2, stages=4)


def unsupported(
    capability: Capability, scheme: str, dtype: torch.dtype, out_features: int
) -> str | None:
    """Why the kernel does not serve layers of that kind, or None."""
    if scheme != "fp8-block":
        return "its CUDA kernel multiplies e4m3 in blocks"
    if dtype is not torch.bfloat16:
        return f"its CUDA kernel has results of bfloat16, not {dtype}"
    if out_features % BLOCK:
        return f"its CUDA kernel takes multiples of {BLOCK} features, got {out_features}"
    if capability.at_least(9, 0) and not capability.at_least(10, 0):
        return None
    return "its CUDA kernel is written for sm90's tensor cores"


class Layer(NamedTuple):
    """Operands of a product: q and weight e4m3, scales float32.

    q is (…, K), q_scale (M, K / 128), weight (N, K), weight_scale (N / 128, K / 128); K and N are
    multiples of 128; the bias, if any, is (N,) in float32 or bfloat16.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None


def linear(layer: Layer, variant: Variant = VARIANT) -> torch.Tensor:
    """(…, N) bfloat16."""
    y = _empty(layer, torch.bfloat16)
    _launch(BF16, layer, y, variant)
    return y


def linear_gelu_quantize(
    layer: Layer, variant: Variant = VARIANT
) -> tuple[torch.Tensor, torch.Tensor]:
    """GELU's tanh form, (…, N) e4m3, and its scale (M, N / 128) with strides (1, M)."""
    q = _empty(layer, torch.float8_e4m3fn)
    groups, tokens = q.shape[-1] // BLOCK, q.numel() // q.shape[-1]
    scale = torch.empty((groups, tokens), dtype=torch.float32, device=q.device).t()
    _launch(GELU_QUANTIZED, layer, q, variant, y_scale=scale)
    return q, scale


def linear_gated_residual(
    layer: Layer, x: torch.Tensor, gate: torch.Tensor | None, variant: Variant = VARIANT
) -> torch.Tensor:
    """x + y · gate, or x + y without one: bfloat16, y not rounded before.

    Args:
        x: (B, L, N) bfloat16.
        gate: (B or 1, L or 1, N), float32 or bfloat16, or None.
    """
    stream = _empty(layer, torch.bfloat16)
    _launch(GATED_RESIDUAL, layer, stream, variant, x=x, gate=gate)
    return stream


def _empty(layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    shape = (*layer.q.shape[:-1], layer.weight.shape[0])
    return torch.empty(shape, dtype=dtype, device=layer.q.device)


def _launch(
    epilogue: int,
    layer: Layer,
    y: torch.Tensor,
    variant: Variant,
    *,
    y_scale: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> None:
    if y.numel() == 0:
        return
    features, depth = layer.weight.shape
    q = _on_16_bytes(layer.q.contiguous())
    weight = _on_16_bytes(layer.weight.contiguous())
    bias = None if layer.bias is None else _on_16_bytes(layer.bias.contiguous())
    tokens = q.numel() // depth
    per_row = gate is not None and tuple(gate.shape[:2]) != (1, 1)
    length = tokens
    if x is not None:
        x, length = _on_16_bytes(x.contiguous()), x.shape[1]
        gate = None if gate is None else _on_whole_chunks(gate).expand(x.shape)
    defines = {
        "EPILOGUE": epilogue,
        "BIAS": _KINDS[None if bias is None else bias.dtype],
        "GATE": _KINDS[None if gate is None else gate.dtype],
        "GATE_PER_ROW": int(per_row),
        **{name.upper(): value for name, value in variant._asdict().items()},
    }
    kernel = load_kernel(
        "common.cuh+hopper.cuh+cluster.cuh+linear.cu", "linear", "sm_90a", q.device.index,
        tuple(defines.items()), variant.shared_bytes,
    )  # fmt: skip
    tiles = -(-tokens // variant.rows) * -(-features // (BLOCK * variant.cluster))
    clusters = min(tiles, multiprocessors(q.device) // variant.cluster)
    kernel.launch(
        (clusters * variant.cluster,), variant.threads,
        map_of_rows(q, tokens, depth, variant.rows // variant.cluster),
        map_of_weight(weight, 16 if epilogue == GELU_QUANTIZED else 8),
        layer.q_scale.t().contiguous(), layer.weight_scale.contiguous(), bias,
        y, y_scale, x, gate,
        Long(0 if gate is None else gate.stride(0)), Long(0 if gate is None else gate.stride(1)),
        length, tokens, features, depth // BLOCK,
    )  # fmt: skip


def map_of_rows(q: torch.Tensor, tokens: int, depth: int, box_rows: int) -> TensorMap:
    """q as (tokens, depth), a box being `box_rows` × 128."""
    return encode(q.data_ptr(), (depth, tokens), (depth,), (BLOCK, box_rows))


def map_of_weight(weight: torch.Tensor, run: int) -> TensorMap:
    """A weight (N, K), a box being 128 rows × 128 in the order that linear.cu says for `run`.

    Row 4·run·a + 8i + 2t + e of a box is row 4·run·a + run·t + 2i + e of the weight's 128, so the
    sides, from within, are K, e, t, i and a.
    """
    features, depth = weight.shape
    sides = (depth, 2, 4, run // 2, features // (4 * run))
    strides = (depth, run * depth, 2 * depth, 4 * run * depth)
    return encode(weight.data_ptr(), sides, strides, (BLOCK, 2, 4, run // 2, BLOCK // (4 * run)))


def _on_whole_chunks(gate: torch.Tensor) -> torch.Tensor:
    """The gate (…, N) itself where each row begins on 16 bytes, else a copy."""
    strides = [s for s, n in zip(gate.stride(), gate.shape, strict=True) if n > 1]
    step = 16 // gate.element_size()
    if gate.stride(-1) != 1 or any(stride % step for stride in strides[:-1]):
        gate = gate.contiguous()
    return _on_16_bytes(gate)


def _on_16_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
