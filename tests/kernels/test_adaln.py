"""adaln(x) = LN(x) · (1 + scale) + shift."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import (
    DTYPES,
    LEAST_SQNR_DB,
    assert_opcheck,
    modulation,
    run_by,
    sqnr_db,
)
from turbo_opt.kernels import OperatorInputError, adaln

EPS = 1e-6
PROVIDERS = ["reference", "triton"]
MODULATIONS = ["shared", "per batch", "per token"]


def definition(x, scale, shift, eps=EPS):
    x, scale, shift = x.double(), scale.double(), shift.double()
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    return centered / deviation * (1 + scale) + shift


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MODULATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 7, 100), (2, 5, 384), (1, 3, 1536)])
def test_adaln_equals_its_definition(provider, dtype, kind, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype) * 3 + 1
    scale, shift = modulation(kind, x, torch.float32), modulation(kind, x, torch.float32)
    y = run_by(provider, "adaln", x, scale, shift, EPS)
    assert y.dtype is dtype
    assert sqnr_db(definition(x, scale, shift), y) > LEAST_SQNR_DB[dtype]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_scale_per_token_and_shift_per_batch_may_be_mixed(provider, device):
    x = torch.randn(2, 9, 256, device=device)
    scale, shift = modulation("per token", x, x.dtype), modulation("per batch", x, x.dtype)
    y = run_by(provider, "adaln", x, scale, shift, EPS)
    assert sqnr_db(definition(x, scale, shift), y) > LEAST_SQNR_DB[x.dtype]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_input_and_chunked_modulation(provider, device):
    x = torch.randn(5, 2, 3, 128, device=device).select(2, 1).transpose(0, 1)
    scale, shift = torch.randn(2, 6, 128, device=device).chunk(6, dim=1)[2:4]
    expected = definition(x, scale, shift)
    assert sqnr_db(expected, run_by(provider, "adaln", x, scale, shift, EPS)) > 115
    last_strided = torch.randn(2, 128, 5, device=device).transpose(1, 2)
    y = run_by(provider, "adaln", last_strided, scale, shift, EPS)
    assert sqnr_db(definition(last_strided, scale, shift), y) > 115


@pytest.mark.parametrize("provider", PROVIDERS)
def test_constant_rows_become_the_shift(provider, device):
    x = torch.full((1, 3, 256), 1000.0, device=device)
    scale, shift = torch.randn(2, 1, 1, 256, device=device)
    y = run_by(provider, "adaln", x, scale, shift, EPS)
    torch.testing.assert_close(y, shift.expand_as(y), rtol=0, atol=1e-2)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_one_huge_outlier_leaves_no_nan(provider, device):
    x = torch.randn(1, 2, 256, device=device)
    x[0, 0, 3] = 1e15
    zero = torch.zeros(1, 1, 256, device=device)
    assert run_by(provider, "adaln", x, zero, zero, EPS).isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens_give_no_tokens(provider, device):
    x, scale = torch.randn(2, 0, 128, device=device), torch.randn(2, 1, 128, device=device)
    assert run_by(provider, "adaln", x, scale, scale, EPS).shape == (2, 0, 128)


def test_opcheck(device):
    x, scale = torch.randn(2, 5, 128, device=device), torch.randn(2, 1, 128, device=device)
    assert_opcheck("adaln", x, scale, scale, EPS)


def test_export_keeps_batch_and_tokens_dynamic():
    class Modulated(torch.nn.Module):
        def forward(self, x, scale, shift):
            return adaln(x, scale, shift)

    x, scale = torch.randn(2, 6, 64), torch.randn(2, 1, 64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(
        Modulated(),
        (x, scale, scale),
        dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}),
        strict=False,
    )
    longer, scale = torch.randn(3, 11, 64), torch.randn(3, 1, 64)
    torch.testing.assert_close(
        program.module()(longer, scale, scale), adaln(longer, scale, scale), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (torch.randn(4, 8), torch.randn(1, 1, 8), "3 dimensions"),
        (torch.randn(1, 4, 8), torch.randn(1, 1, 9), "scale must have shape"),
        (torch.randn(1, 4, 8), torch.randn(1, 3, 8), "scale must have shape"),
        (torch.randn(1, 4, 8), torch.randn(1, 1, 8).half(), "scale must be float32"),
        (torch.randn(1, 4, 8).double(), torch.randn(1, 1, 8), "float64"),
    ],
)
def test_wrong_arguments_are_named(x, scale, message):
    with pytest.raises(OperatorInputError, match=message):
        adaln(x, scale, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize(
    "shape", [(1, 32760, 1536), (1, 75600, 5120), (2, 4095, 3072), (3, 65, 2816), (1, 65, 6144)]
)
def test_real_shapes(provider, shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    scale, shift = modulation("per batch", x, torch.float32), modulation("shared", x, torch.float32)
    expected = run_by("reference", "adaln", x, scale, shift, EPS)
    assert sqnr_db(expected, run_by(provider, "adaln", x, scale, shift, EPS)) > 50


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("shape", [(1, 7, 1536), (2, 33, 5120)])
@pytest.mark.parametrize("mean", [30.0, -300.0])
def test_a_mean_that_is_large_beside_the_deviation_costs_no_digits(provider, shape, mean, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    x[:, ::2] += mean  # every other row, as the kernel takes two together
    scale, shift = modulation("per batch", x, torch.float32), modulation("shared", x, torch.float32)
    expected = definition(x, scale, shift, EPS)
    assert sqnr_db(expected, run_by(provider, "adaln", x, scale, shift, EPS)) > 50
