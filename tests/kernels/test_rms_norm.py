"""rms_norm(x) = x / sqrt(mean(x²) + eps) · weight, as aten.rms_norm rounds it."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import DTYPES, LEAST_SQNR_DB, assert_opcheck, run_by, sqnr_db
from turbo_opt.kernels import OperatorInputError, rms_norm

EPS = 1e-6
PROVIDERS = ["reference", "triton"]


def definition(x, weight, eps=EPS):
    x = x.double()
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight.double()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(64,), (7, 100), (2, 5, 384), (1, 2, 1536)])
def test_rms_norm_equals_its_definition(provider, dtype, weighted, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 2 + 1
    weight = torch.randn(shape[-1], device=device) if weighted else None
    y = run_by(provider, "rms_norm", x, weight, EPS)
    assert sqnr_db(definition(x, weight), y) > LEAST_SQNR_DB[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", ["float32", "x's"])
def test_reference_rounds_as_aten_does(dtype, weight_dtype, device):
    x = torch.randn(33, 256, device=device, dtype=dtype)
    weight = torch.randn(
        256, device=device, dtype=torch.float32 if weight_dtype == "float32" else dtype
    )
    aten = torch.ops.aten.rms_norm(x, [256], weight, EPS)
    ours = run_by("reference", "rms_norm", x, weight, EPS)
    assert aten.dtype is ours.dtype is dtype
    # float32 sums may be taken in another order; what they round to differs at most rarely.
    assert (aten != ours).float().mean() < (1e-3 if dtype is not torch.float32 else 1.0)
    torch.testing.assert_close(ours, aten, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_zero_rows_stay_zero(provider, device):
    x = torch.zeros(3, 256, device=device)
    assert (run_by(provider, "rms_norm", x, None, EPS) == 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_right_as_long_as_float32_holds_their_squares_and_then_become_zero(
    provider, dtype, device
):
    x = torch.randn(5, 256, device=device).to(dtype)
    x[1] *= 1e17
    x[2, 7] = 1e18
    x[3, 7] = 1e20
    x[4] *= 1e30
    y = run_by(provider, "rms_norm", x, None, EPS)
    for row in range(3):
        assert sqnr_db(definition(x[row], None), y[row]) > LEAST_SQNR_DB[dtype]
    assert not y[3:].any()
    assert not torch.nn.functional.rms_norm(x[3:].cpu(), (256,), None, EPS).any()


def test_opcheck(device):
    x, weight = torch.randn(2, 5, 128, device=device), torch.randn(128, device=device)
    assert_opcheck("rms_norm", x, weight, EPS)


def test_integer_input_is_refused():
    with pytest.raises(OperatorInputError, match="x must be bfloat16"):
        rms_norm(torch.ones(2, 8, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32760, 1536), (75600, 5120)])
def test_real_shapes(shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    weight = torch.randn(shape[-1], device=device)
    expected = run_by("reference", "rms_norm", x, weight, EPS)
    assert sqnr_db(expected, run_by("triton", "rms_norm", x, weight, EPS)) > 50
