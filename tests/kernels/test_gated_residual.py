"""gated_residual(x, y, gate) = x + y · gate, rounded once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_checks import (
    DTYPES,
    LEAST_SQNR_DB,
    assert_opcheck,
    modulation,
    run_by,
    skip_unless_served,
    sqnr_db,
)
from turbo_opt.kernels import OperatorInputError, choose, gated_residual

PROVIDERS = ["reference", "triton"]
GATES = ["none", "shared", "per batch", "per token"]


def definition(x, y, gate):
    return x.double() + (y.double() if gate is None else y.double() * gate.double())


def gate_of(kind, x, dtype=torch.float32):
    return None if kind == "none" else modulation(kind, x, dtype)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 7, 100), (2, 5, 384), (1, 3, 1536)])
def test_gated_residual_equals_its_definition(provider, dtype, kind, shape, device):
    x, y = torch.randn(2, *shape, device=device, dtype=dtype)
    for gate_dtype in (torch.float32, dtype):
        gate = gate_of(kind, x, gate_dtype)
        result = run_by(provider, "gated_residual", x, y, gate)
        assert result.dtype is dtype
        assert sqnr_db(definition(x, y, gate), result) > LEAST_SQNR_DB[dtype]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    channels=st.integers(1, 700),
    kind=st.sampled_from(GATES),
    seed=st.integers(0, 2**31),
)
def test_any_size(device, batch, length, channels, kind, seed):
    torch.manual_seed(seed)
    x, y = torch.randn(2, batch, length, channels, device=device)
    gate = gate_of(kind, x)
    for provider in PROVIDERS:
        result = run_by(provider, "gated_residual", x, y, gate)
        torch.testing.assert_close(result.double(), definition(x, y, gate), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_inputs_and_a_chunk_of_the_modulation(provider, device):
    x = torch.randn(5, 2, 3, 128, device=device).select(2, 1).transpose(0, 1)
    y = torch.randn(2, 128, 5, device=device).mT
    gate = torch.randn(2, 6, 128, device=device).chunk(6, dim=1)[2]
    result = run_by(provider, "gated_residual", x, y, gate)
    assert sqnr_db(definition(x, y, gate), result) > 115


@pytest.mark.parametrize("provider", PROVIDERS)
def test_zeros_keep_the_stream_and_outliers_leave_no_nan(provider, device):
    x, y = torch.randn(2, 1, 3, 256, device=device)
    y[0, 1] = 0
    y[0, 2, 7] = 1e30
    result = run_by(provider, "gated_residual", x, y, torch.full((1, 1, 256), 1e5, device=device))
    assert torch.equal(result[0, 1], x[0, 1]) and result.isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens_give_no_tokens(provider, device):
    x = torch.randn(2, 0, 128, device=device)
    assert run_by(provider, "gated_residual", x, x, None).shape == (2, 0, 128)


def test_opcheck(device):
    x, y = torch.randn(2, 2, 5, 128, device=device)
    assert_opcheck("gated_residual", x, y, gate_of("per batch", x))


def test_choice_on_described_devices():
    x = torch.empty(1, 9, 64, device="meta")
    assert choose("gated_residual", "sm80", x, x, None) == "triton"
    assert choose("gated_residual", "sm75", x, x, None) == "reference"
    assert choose("gated_residual", "cpu", x, x, None) == "reference"
    wide = torch.empty(1, 9, 256, dtype=torch.bfloat16, device="meta")
    assert choose("gated_residual", "sm90", wide, wide, None) == "cuda"
    assert choose("gated_residual", "sm90", x, x, None) == "triton"
    assert choose("gated_residual", "sm120", wide, wide, None) == "triton"


X = torch.ones(2, 4, 8)


@pytest.mark.parametrize(
    ("x", "y", "gate", "message"),
    [
        (X[0], X[0], None, "x must have 3 dimensions"),
        (X.double(), X, None, "x must be bfloat16"),
        (X, X.half(), None, r"y must be torch.float32 of shape \(2, 4, 8\) as x is"),
        (X, X[:1], None, r"got torch.float32 of shape \(1, 4, 8\)"),
        (X, X[0], None, r"got torch.float32 of shape \(4, 8\)"),
        (X, X, torch.ones(1, 1, 9), "gate must have shape"),
        (X, X, torch.ones(1, 3, 8), "gate must have shape"),
        (X, X, torch.ones(1, 1, 8).half(), "gate must be float32"),
    ],
)
def test_wrong_arguments_are_named(x, y, gate, message):
    with pytest.raises(OperatorInputError, match=f"^gated_residual: .*{message}"):
        gated_residual(x, y, gate)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 256), (2, 77, 1536), (1, 32760, 1536), (1, 75600, 5120), (2, 4095, 3072)]
)
def test_bfloat16_on_the_gpu(provider, kind, shape, device):
    x, y = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)
    gate = gate_of(kind, x)
    skip_unless_served("gated_residual", provider, x, y, gate)
    expected = run_by("reference", "gated_residual", x, y, gate)
    assert sqnr_db(expected, run_by(provider, "gated_residual", x, y, gate)) > 50
