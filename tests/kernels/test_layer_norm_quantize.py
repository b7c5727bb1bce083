"""layer_norm_quantize(x) = quantize_activation(layer_norm(x)), without rounding in between."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import DTYPES, assert_opcheck, assert_quantized_alike, run_by
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    layer_norm,
    layer_norm_quantize,
    quantize_activation,
)

EPS = 1e-6
PROVIDERS = ["reference", "triton"]


def parameters(x, kind):
    weight, bias = torch.randn(2, x.shape[-1], device=x.device)
    return {"none": (None, None), "weight": (weight, None), "both": (weight, bias)}[kind]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["none", "weight", "both"])
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 70, 384), (1, 129, 256)])
def test_equals_norm_then_quantization_in_float32(provider, scheme, kind, shape, device):
    x = torch.randn(shape, device=device) * 2 + 1
    first, second = parameters(x, kind)
    expected = quantize_activation(layer_norm(x, first, second, EPS), scheme)
    actual = run_by(provider, "layer_norm_quantize", x, first, second, EPS, scheme)
    assert_quantized_alike(expected, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_rounded_to_the_input_dtype(dtype, scheme, device):
    x = torch.randn(2, 40, 256, device=device, dtype=dtype)
    first, second = parameters(x, "both")
    expected = run_by("reference", "layer_norm_quantize", x.float(), first, second, EPS, scheme)
    for provider in PROVIDERS:
        actual = run_by(provider, "layer_norm_quantize", x, first, second, EPS, scheme)
        assert_quantized_alike(expected, actual)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_input(provider, scheme, device):
    x = torch.randn(65, 2, 3, 128, device=device)[:, :, 1].transpose(0, 1)
    first, second = parameters(x, "both")
    expected = run_by(
        "reference", "layer_norm_quantize", x.contiguous(), first, second, EPS, scheme
    )
    actual = run_by(provider, "layer_norm_quantize", x, first, second, EPS, scheme)
    assert_quantized_alike(expected, actual)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_constant_rows_and_outliers_leave_no_nan(provider, scheme, device):
    x = torch.full((1, 130, 256), 3.0, device=device)
    x[0, 5, 7] = 1e15
    first, second = parameters(x, "both")
    q, scale = run_by(provider, "layer_norm_quantize", x, first, second, EPS, scheme)
    assert q.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    x = torch.randn(2, 5, 256, device=device)
    first, second = parameters(x, "both")
    assert_opcheck("layer_norm_quantize", x, first, second, EPS, scheme)


def test_wrong_arguments_are_named():
    x = torch.randn(1, 4, 200)
    first, second = parameters(x, "both")
    with pytest.raises(OperatorInputError, match="multiple of 128, got 200"):
        layer_norm_quantize(x, first, second)
    with pytest.raises(OperatorInputError, match="did you mean 'fp8-block'"):
        layer_norm_quantize(x, first, second, EPS, "fp8-blok")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 32760, 1536), (1, 75600, 5120)])
def test_real_shapes(scheme, shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    first, second = parameters(x, "both")
    expected = run_by("reference", "layer_norm_quantize", x, first, second, EPS, scheme)
    actual = run_by("triton", "layer_norm_quantize", x, first, second, EPS, scheme)
    assert_quantized_alike(expected, actual)
