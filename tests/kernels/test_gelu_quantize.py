"""gelu_quantize(x) = quantize_activation(gelu_tanh(x)), without rounding in between."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.kernel_checks import (
    DTYPES,
    TRITON_CHOICES,
    assert_opcheck,
    assert_quantized_alike,
    relative_error,
    run_by,
    skip_unless_served,
)
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    block_linear,
    choose,
    dequantize_activation,
    gelu_quantize,
    quantize_activation,
    quantize_weight,
)

PROVIDERS = ["reference", "triton"]
# Of the linear layer after it, against float64. More than the 0.015 of int8 on Gaussian data: one
# step per block serves values of which half are almost 0.
LARGEST_ERROR = {"int8-block": 0.02, "fp8-block": 0.04}


def gelu_tanh(x):
    x = x.double()
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(128,), (1, 256), (2, 65, 384)])
def test_equals_gelu_in_float64_then_quantization(provider, dtype, scheme, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 2
    expected = quantize_activation(gelu_tanh(x).float(), scheme)
    assert_quantized_alike(expected, run_by(provider, "gelu_quantize", x, scheme))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_input(provider, scheme, device):
    x = torch.randn(3, 50, 2, 256, device=device)[:, :, 1].transpose(0, 1)
    expected = run_by("reference", "gelu_quantize", x.contiguous(), scheme)
    assert_quantized_alike(expected, run_by(provider, "gelu_quantize", x, scheme))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_blocks_and_values_of_any_size_leave_no_nan(provider, scheme, device):
    x = torch.randn(256, 384, device=device)
    x[:128, :128] = 0
    x[128:, 128:256] = -1e15  # GELU of it is 0
    x[3, 300], x[4, 300] = 3e37, -3e37
    q, scale = run_by(provider, "gelu_quantize", x, scheme)
    back = dequantize_activation(q, scale, scheme)
    assert back.isfinite().all() and (scale > 0).all()
    assert (back[:128, :128] == 0).all() and (back[128:, 128:256] == 0).all()
    assert back[3, 300].item() == pytest.approx(3e37, rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_linear_layer_after_it_stays_accurate(scheme, device):
    """Triton's interpreter truncates to fp8, so there the reference is judged alone."""
    x = torch.randn(256, 512, device=device)
    weight = torch.randn(128, 512, device=device) / 512**0.5
    expected = gelu_tanh(x) @ weight.double().T
    exact = scheme == "int8-block" or device.type == "cuda"
    for provider in PROVIDERS if exact else ["reference"]:
        operands = *run_by(provider, "gelu_quantize", x, scheme), *quantize_weight(weight, scheme)
        y = block_linear(*operands, None, scheme, torch.float32)
        assert relative_error(expected, y) < LARGEST_ERROR[scheme], provider


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens(provider, scheme, device):
    q, scale = run_by(provider, "gelu_quantize", torch.randn(0, 256, device=device), scheme)
    assert q.shape == (0, 256) and scale.shape == (0, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    assert_opcheck("gelu_quantize", torch.randn(2, 5, 256, device=device), scheme)


@pytest.mark.parametrize(("device_name", "scheme", "provider"), TRITON_CHOICES)
def test_choice_on_described_devices(device_name, scheme, provider):
    assert choose("gelu_quantize", device_name, torch.empty(4, 256), scheme) == provider
    half = torch.empty(4, 256, dtype=torch.bfloat16)
    assert choose("gelu_quantize", device_name, half, scheme) == provider


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hopper_is_served_by_cuda_in_bfloat16(scheme):
    x = torch.empty(4, 256, dtype=torch.bfloat16)
    assert choose("gelu_quantize", "sm90", x, scheme) == "cuda"
    assert choose("gelu_quantize", "sm90", x.float(), scheme) == "triton"


@pytest.mark.parametrize(
    ("x", "scheme", "message"),
    [
        (torch.ones(4, 200), "int8-block", "multiple of 128, got 200"),
        (torch.ones(4, 128), "int8_block", "did you mean 'int8-block'"),
        (torch.ones(4, 128).double(), "fp8-block", "gelu_quantize: x must be bfloat16"),
        (torch.tensor(1.0), "fp8-block", "gelu_quantize: x must have at least one dimension"),
    ],
)
def test_wrong_arguments_are_named(x, scheme, message):
    with pytest.raises(OperatorInputError, match=message):
        gelu_quantize(x, scheme)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "shape", [(1, 128), (77, 384), (2, 65, 256), (32760, 8960), (75600, 13824)]
)
def test_bfloat16_on_the_gpu(provider, scheme, shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    skip_unless_served("gelu_quantize", provider, x, scheme)
    expected = run_by("reference", "gelu_quantize", x, scheme)
    assert_quantized_alike(expected, run_by(provider, "gelu_quantize", x, scheme))
