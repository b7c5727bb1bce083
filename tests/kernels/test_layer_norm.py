"""layer_norm(x) = (x − mean) / sqrt(variance + eps) · weight + bias."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import DTYPES, LEAST_SQNR_DB, assert_opcheck, run_by, sqnr_db
from turbo_opt.kernels import OperatorInputError, layer_norm

EPS = 1e-5
PROVIDERS = ["reference", "triton"]


def definition(x, weight, bias, eps=EPS):
    x = x.double()
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", ["none", "weight", "both", "both in x's dtype"])
@pytest.mark.parametrize("shape", [(64,), (7, 100), (2, 5, 384), (1, 2, 3, 1536)])
def test_layer_norm_equals_its_definition(provider, dtype, affine, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 2 - 1
    parameter_dtype = dtype if affine.endswith("dtype") else torch.float32
    weight, bias = torch.randn(2, shape[-1], device=device, dtype=parameter_dtype)
    weight = None if affine == "none" else weight
    bias = bias if affine.startswith("both") else None
    y = run_by(provider, "layer_norm", x, weight, bias, EPS)
    assert y.dtype is dtype
    assert sqnr_db(definition(x, weight, bias), y) > LEAST_SQNR_DB[dtype]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_rows(provider, device):
    x = torch.randn(6, 4, 256, device=device)[:, ::2]
    assert (
        sqnr_db(definition(x, None, None), run_by(provider, "layer_norm", x, None, None, EPS)) > 115
    )
    x = torch.randn(256, 6, device=device).t()
    assert (
        sqnr_db(definition(x, None, None), run_by(provider, "layer_norm", x, None, None, EPS)) > 115
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_constant_rows_become_the_bias(provider, device):
    x = torch.full((3, 256), -7.0, device=device)
    weight, bias = torch.randn(2, 256, device=device)
    y = run_by(provider, "layer_norm", x, weight, bias, EPS)
    torch.testing.assert_close(y, bias.expand_as(y), rtol=0, atol=1e-2)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_right_as_long_as_float32_holds_their_squares_and_then_become_the_bias(
    provider, dtype, device
):
    x = torch.randn(4, 256, device=device).to(dtype)
    x[1] *= 1e17
    x[2, 7] = 1e18
    x[3, 7] = 1e20
    weight, bias = torch.randn(2, 256, device=device)
    y = run_by(provider, "layer_norm", x, weight, bias, EPS)
    for row in range(3):
        assert sqnr_db(definition(x[row], weight, bias), y[row]) > LEAST_SQNR_DB[dtype]
    if provider != "reference" or device.type == "cpu":  # PyTorch's own may give NaN on a GPU
        assert sqnr_db(bias, y[3]) > LEAST_SQNR_DB[dtype]


def test_opcheck(device):
    x, weight = torch.randn(2, 5, 128, device=device), torch.randn(128, device=device)
    assert_opcheck("layer_norm", x, weight, None, EPS)


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.randn(9), r"shape \(8,\)"), (torch.randn(8).half(), "float32 or torch.float32")],
)
def test_wrong_weight_is_named(weight, message):
    with pytest.raises(OperatorInputError, match=message):
        layer_norm(torch.randn(2, 8), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32760, 1536), (75600, 5120)])
def test_real_shapes(shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, shape[-1], device=device)
    expected = run_by("reference", "layer_norm", x, weight, bias, EPS)
    assert sqnr_db(expected, run_by("triton", "layer_norm", x, weight, bias, EPS)) > 50
