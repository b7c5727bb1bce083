"""residual_adaln_quantize: x' = x + y · gate, and adaln(x') quantized."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import (
    DTYPES,
    LEAST_SQNR_DB,
    assert_opcheck,
    assert_quantized_alike,
    run_by,
    skip_unless_served,
    sqnr_db,
)
from tests.kernels.test_gated_residual import GATES, gate_of
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    choose,
    quantize_activation,
    residual_adaln_quantize,
)

NAME = "residual_adaln_quantize"
EPS = 1e-6
PROVIDERS = ["reference", "triton"]
PAIRS = list(zip(GATES, ["per token", "shared", "per token", "per batch"], strict=True))


def parameters_of(kind, x):
    batch, length, channels = x.shape
    shape = {"shared": (1, 1), "per batch": (batch, 1), "per token": (batch, length)}[kind]
    return tuple(torch.randn(2, *shape, channels, device=x.device))


def normalized(x, scale, shift):
    """adaln in float64."""
    x = x.double()
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y * (1 + scale.double()) + shift.double()


def assert_both_results(result, x, y, gate, parameters, scheme):
    """The stream is the rounded sum; what is quantized is the norm of the stream as rounded."""
    stream, *quantized = result
    exact = x.double() + (y.double() if gate is None else y.double() * gate.double())
    assert stream.dtype is x.dtype
    assert sqnr_db(exact, stream) > LEAST_SQNR_DB[x.dtype]
    expected = quantize_activation(normalized(stream, *parameters).float(), scheme)
    assert_quantized_alike(expected, tuple(quantized))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("gate_kind", "kind"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 66, 256)])
def test_equals_its_definition(provider, scheme, kind, gate_kind, shape, device):
    x, y = torch.randn(2, *shape, device=device) * 2 + 1
    gate, parameters = gate_of(gate_kind, x), parameters_of(kind, x)
    result = run_by(provider, NAME, x, y, gate, *parameters, EPS, scheme)
    assert_both_results(result, x, y, gate, parameters, scheme)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("channels", [128, 768])
def test_the_norm_reads_the_stream_as_it_is_stored(provider, dtype, scheme, channels, device):
    x, y = torch.randn(2, 2, 9, channels, device=device, dtype=dtype)
    gate, parameters = gate_of("per batch", x, dtype), parameters_of("shared", x)
    result = run_by(provider, NAME, x, y, gate, *parameters, EPS, scheme)
    assert_both_results(result, x, y, gate, parameters, scheme)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_inputs(provider, scheme, device):
    x = torch.randn(65, 2, 3, 128, device=device)[:, :, 1].transpose(0, 1)
    y = torch.randn(2, 128, 65, device=device).mT
    gate = torch.randn(2, 6, 128, device=device).chunk(6, dim=1)[2]
    parameters = parameters_of("shared", x)
    result = run_by(provider, NAME, x, y, gate, *parameters, EPS, scheme)
    assert_both_results(result, x, y, gate, parameters, scheme)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_constant_rows_zero_rows_and_outliers_leave_no_nan(provider, scheme, device):
    x, y = torch.full((2, 1, 130, 256), 3.0, device=device)
    x[0, 64:], y[0, 64:] = 0, 0
    x[0, 5, 7], y[0, 6, 7] = 1e15, -1e15
    parameters = parameters_of("shared", x)
    stream, q, scale = run_by(provider, NAME, x, y, None, *parameters, EPS, scheme)
    assert stream.isfinite().all() and q.float().isfinite().all()
    assert scale.isfinite().all() and (scale > 0).all()
    assert (stream[0, 64:] == 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_give_no_tokens(provider, scheme, device):
    x = torch.randn(2, 0, 128, device=device)
    parameters = parameters_of("shared", x)
    stream, q, scale = run_by(provider, NAME, x, x, None, *parameters, EPS, scheme)
    assert stream.shape == q.shape == (2, 0, 128) and scale.shape == (0, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    x, y = torch.randn(2, 2, 5, 256, device=device)
    gate = gate_of("per batch", x)
    assert_opcheck(NAME, x, y, gate, *parameters_of("shared", x), EPS, scheme)


@pytest.mark.parametrize(
    ("device_name", "scheme", "provider"),
    [
        ("sm89", "fp8-block", "triton"),
        ("sm80", "fp8-block", "reference"),
        ("sm80", "int8-block", "triton"),
        ("cpu", "int8-block", "reference"),
    ],
)
def test_choice_on_described_devices(device_name, scheme, provider):
    x = torch.empty(1, 9, 256)
    parameters = parameters_of("shared", x)
    assert choose(NAME, device_name, x, x, None, *parameters, EPS, scheme) == provider


def test_wrong_arguments_are_named():
    x = torch.randn(1, 4, 256)
    first, second = parameters_of("shared", x)
    for arguments, message in (
        ((x, x[:, :3], None, first, second), f"^{NAME}: y must be torch.float32 of shape"),
        ((x, x, first[..., :9], first, second), f"^{NAME}: gate must have shape"),
        ((x, x, None, first[..., :9], second), "scale must have shape"),
        ((x, x, None, first, second.half()), "shift must be float32 or torch.float32"),
        ((x[..., :200], x[..., :200], None, first[..., :200], second[..., :200]), "got 200"),
    ):
        with pytest.raises(OperatorInputError, match=message):
            residual_adaln_quantize(*arguments)
    with pytest.raises(OperatorInputError, match="did you mean 'fp8-block'"):
        residual_adaln_quantize(x, x, None, first, second, EPS, "fp8-blok")


def test_hopper_is_served_by_cuda_where_groups_are_quantized():
    x = torch.empty(1, 9, 256, dtype=torch.bfloat16)
    parameters = parameters_of("shared", x)
    assert choose(NAME, "sm90", x, x, None, *parameters, EPS, "fp8-block") == "cuda"
    assert choose(NAME, "sm90", x, x, None, *parameters, EPS, "int8-block") == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("gate_kind", "kind"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 256), (2, 77, 1536), (1, 32760, 1536), (1, 75600, 5120)])
def test_bfloat16_on_the_gpu(provider, scheme, gate_kind, kind, shape, device):
    x, y = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)
    args = (x, y, gate_of(gate_kind, x), *parameters_of(kind, x), EPS, scheme)
    skip_unless_served(NAME, provider, *args)
    stream, *quantized = run_by(provider, NAME, *args)
    assert sqnr_db(run_by("reference", NAME, *args)[0], stream) > 50
    _, *expected = run_by("reference", NAME, stream, torch.zeros_like(x), None, *args[3:])
    assert_quantized_alike(tuple(expected), tuple(quantized))
