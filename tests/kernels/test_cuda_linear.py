"""linear.cu's launcher: order of the weight's rows, what fits, and the epilogues on a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.kernels.kernel_checks import relative_error
from turbo_opt.kernels import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from turbo_opt.kernels._cuda import compiler, linear, tensor_map
from turbo_opt.kernels._cuda.linear import VARIANT, Layer, Variant

VARIANTS = [
    VARIANT,
    Variant(cluster=1, consumers=2, halves=2, stages=4),
    Variant(cluster=2, consumers=3, halves=1, stages=5),
    Variant(cluster=2, consumers=2, halves=1, stages=6),
]
LARGEST_SHARED_BYTES = 232448  # of a program on Hopper


@pytest.fixture
def encoded(monkeypatch):
    """What tensor maps are asked for, as (address, sides, strides, box)."""
    calls = []
    monkeypatch.setattr(linear, "encode", lambda *call: calls.append(call))
    return calls


def rows_of_box(sides, strides, box, last):
    """The byte offset, or None outside, of each row of 128 bytes that a copy brings, in order."""
    rows = [0]
    for axis in range(1, len(sides)):
        start = last if axis == len(sides) - 1 else 0
        steps = [
            start * strides[axis - 1] + i * strides[axis - 1] if start + i < sides[axis] else None
            for i in range(box[axis])
        ]
        rows = [
            None if step is None or row is None else row + step for step in steps for row in rows
        ]
    return rows


@pytest.mark.parametrize("run", [8, 16])
@pytest.mark.parametrize("column", [0, 2, 3])
def test_a_threads_columns_of_a_product_are_runs_of_neighbouring_features(run, column, encoded):
    features, depth = 3 * 128, 256
    weight = torch.empty(features, depth, dtype=torch.uint8)
    linear.map_of_weight(weight, run)
    ((address, sides, strides, box),) = encoded
    assert address == weight.data_ptr()
    rows = rows_of_box(sides, strides, box, last=column * 32 // run)
    if column == 3:  # of an odd number of columns, for the second program of a cluster
        assert rows == [None] * 128
        return
    assert sorted(rows) == [depth * (128 * column + i) for i in range(128)]
    for t in range(4):  # a thread's columns 8j + 2t and 8j + 2t + 1, in the order of its sums
        mine = [
            rows[8 * j + 2 * t + e] // depth - 128 * column for j in range(16) for e in range(2)
        ]
        runs = [mine[i : i + run] for i in range(0, 32, run)]
        assert runs == [
            list(range(4 * run * a + run * t, 4 * run * a + run * (t + 1)))
            for a in range(32 // run)
        ]


def test_rows_beyond_the_last_token_are_outside_the_map(encoded):
    linear.map_of_rows(torch.empty(130, 256, dtype=torch.uint8), 130, 256, 128)
    ((_, sides, strides, box),) = encoded
    assert rows_of_box(sides, strides, box, last=128) == [128 * 256, 129 * 256] + [None] * 126


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_is_read_where_it_lies_unless_its_rows_are_not_on_16_bytes(dtype):
    modulation = torch.randn(2, 6, 256).to(dtype)
    chunk = modulation[:, 2:3]
    assert linear._on_whole_chunks(chunk).data_ptr() == chunk.data_ptr()
    for gate in (torch.randn(2, 1, 260).to(dtype)[..., 1:257], torch.randn(2, 256, 3).to(dtype).mT):
        ready = linear._on_whole_chunks(gate)
        assert torch.equal(ready, gate)
        assert ready.data_ptr() % 16 == 0
        assert ready.stride(-1) == 1 and ready.stride(0) * ready.element_size() % 16 == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_fits_shared_memory_and_its_boxes(variant):
    assert variant.shared_bytes + 1024 <= LARGEST_SHARED_BYTES  # 1 KiB for barriers
    box_rows = variant.rows // variant.cluster
    assert box_rows <= 256
    assert box_rows % 8 == 0  # the next program's share starts a swizzled group


def test_structures_are_passed_to_kernels_by_value():
    given = tensor_map.TensorMap()
    assert ctypes.sizeof(given) == 128
    assert compiler._argument(given) is given


def test_what_the_driver_refuses_is_an_error_and_maps_are_aligned(monkeypatch):
    seen = []

    class Driver:
        @staticmethod
        def cuTensorMapEncodeTiled(target, kind, rank, address, sides, strides, box, steps, *rest):
            seen.append((ctypes.addressof(target._obj), list(sides), list(strides), list(box)))
            return len(seen) - 1

        @staticmethod
        def cuGetErrorString(status, text):
            text._obj.value = b"invalid argument"

    monkeypatch.setattr(tensor_map, "_driver", lambda: Driver)
    monkeypatch.setattr(compiler, "_driver", lambda: Driver)
    tensor_map.encode.cache_clear()
    tensor_map.encode(4096, (256, 130), (256,), (128, 64))
    assert seen[0][0] % 64 == 0 and seen[0][1:] == ([256, 130], [256], [128, 64])
    with pytest.raises(compiler.KernelError, match="CUDA driver: invalid argument"):
        tensor_map.encode(4096, (256, 131), (256,), (128, 64))
    tensor_map.encode.cache_clear()


def layer_of(tokens, features, depth, device, bias_dtype=torch.float32):
    x = torch.randn(tokens, depth, device=device) * torch.logspace(-1, 1, depth, device=device)
    weight = torch.randn(features, depth, device=device) / depth**0.5
    bias = torch.randn(features, device=device).to(bias_dtype)
    quantized = *quantize_activation(x, "fp8-block"), *quantize_weight(weight, "fp8-block")
    q, q_scale, *its_weight = quantized
    y = dequantize_activation(q, q_scale, "fp8-block").double()
    y = y @ dequantize_weight(*its_weight).double().T + bias.double()
    return Layer(*quantized, bias), y


def needs_hopper(device):
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("linear.cu is written for sm90's tensor cores")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 128, 128), (777, 384, 1536), (4096, 2560, 640)])
def test_every_variant_multiplies(variant, shape, device):
    needs_hopper(device)
    layer, expected = layer_of(*shape, device)
    assert relative_error(expected, linear.linear(layer, variant)) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("gate_shape", [None, (1, 1, 384), (3, 1, 384), (3, 259, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_residual_epilogue(variant, gate_shape, dtype, device):
    needs_hopper(device)
    depth = 1152
    layer, y = layer_of(3 * 259, 384, depth, device, dtype)
    layer = layer._replace(q=layer.q.view(3, 259, depth))
    x = torch.randn(3, 259, 384, device=device).bfloat16()
    gate = None if gate_shape is None else torch.randn(gate_shape, device=device).to(dtype)
    result = linear.linear_gated_residual(layer, x, gate, variant)
    branch = y.view(3, 259, 384)
    expected = x.double() + (branch if gate is None else branch * gate.double())
    assert relative_error(expected, result) < 4e-3


@pytest.mark.gpu
def test_a_result_is_the_same_every_time(device):
    needs_hopper(device)
    layer, _ = layer_of(4096, 2560, 640, device)
    first = linear.linear_gelu_quantize(layer)
    for _ in range(20):
        again = linear.linear_gelu_quantize(layer)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(first, again, strict=True))
