"""linear_gelu_quantize(q, w) = gelu_quantize(block_linear(q, w)), without rounding in between."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.kernel_checks import (
    assert_opcheck,
    assert_quantized_alike,
    relative_error,
    run_by,
    skip_unless_served,
)
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    choose,
    dequantize_activation,
    dequantize_weight,
    explain,
    force_provider,
    linear_gelu_quantize,
    quantize_activation,
    quantize_weight,
)

PROVIDERS = ["reference", "composed"]
NAME = "linear_gelu_quantize"
# Of what is dequantized, against float64: twice the rounding of 8 bits (see test_gelu_quantize).
LARGEST_ERROR = {"int8-block": 0.02, "fp8-block": 0.04}


def problem(tokens, out_features, in_features, scheme, device):
    """Operands whose scales differ from block to block, and a bias."""
    x = torch.randn(tokens, in_features, device=device)
    x *= torch.logspace(-1, 1, in_features, device=device)
    weight = torch.randn(out_features, in_features, device=device) / in_features**0.5
    bias = torch.randn(out_features, device=device)
    return (*quantize_activation(x, scheme), *quantize_weight(weight, scheme), bias)


def exact(q, q_scale, weight, weight_scale, bias, scheme):
    """GELU of the dequantized operands' product, in float64."""
    x = dequantize_activation(q, q_scale, scheme).double()
    y = x @ dequantize_weight(weight, weight_scale).double().T
    y = y if bias is None else y + bias.double()
    return y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 128, 128), (70, 256, 384)])
def test_equals_gelu_of_the_exact_product_then_quantization(
    provider, with_bias, scheme, shape, device
):
    *operands, bias = problem(*shape, scheme, device)
    bias = bias if with_bias else None
    expected = quantize_activation(exact(*operands, bias, scheme).float(), scheme)
    args = (*operands, bias, scheme, torch.float32)
    q, scale = run_by(provider, NAME, *args)
    torch.testing.assert_close(scale, expected[1], rtol=2e-3, atol=0)
    values = dequantize_activation(q, scale, scheme)
    assert relative_error(exact(*operands, bias, scheme), values) < LARGEST_ERROR[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_does_not_round_what_gelu_is_given(scheme, device):
    *operands, bias = problem(70, 256, 384, scheme, device)
    by_dtype = [
        run_by("reference", NAME, *operands, bias, scheme, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for wide, narrow in zip(*by_dtype, strict=True):
        assert torch.equal(wide.float(), narrow.float())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leading_dimensions_are_kept(scheme, device):
    q, q_scale, *rest = problem(2 * 3 * 25, 256, 128, scheme, device)
    flat = run_by("composed", NAME, q, q_scale, *rest, scheme, torch.float32)
    deep = run_by("composed", NAME, q.view(2, 3, 25, 128), q_scale, *rest, scheme, torch.float32)
    assert deep[0].shape == (2, 3, 25, 256)
    assert torch.equal(deep[0].view(-1, 256).float(), flat[0].float())
    assert torch.equal(deep[1], flat[1])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens(provider, device):
    operands = problem(4, 256, 128, "fp8-block", device)
    q, q_scale, *rest = operands
    empty = (q[:0], q_scale[:0], *rest, "fp8-block", torch.bfloat16)
    result = run_by(provider, NAME, *empty)
    assert [part.shape for part in result] == [(0, 256), (0, 2)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    operands = problem(8, 128, 256, scheme, device)
    assert_opcheck(NAME, *operands, scheme, torch.bfloat16)


def test_composed_runs_the_two_operators_as_they_are_forced(device):
    operands = problem(8, 128, 256, "int8-block", device)
    forced = {"block_linear": "reference", "gelu_quantize": "reference"}
    args = (*operands, "int8-block", torch.float32)
    with force_provider(forced):
        assert_quantized_alike(run_by("reference", NAME, *args), run_by("composed", NAME, *args))


@pytest.mark.parametrize(
    ("device_name", "scheme", "dtype", "provider"),
    [
        ("sm90", "fp8-block", torch.bfloat16, "cuda"),
        ("sm90", "fp8-block", torch.float16, "composed"),
        ("sm90", "int8-block", torch.bfloat16, "composed"),
        ("sm89", "fp8-block", torch.bfloat16, "composed"),
        ("sm100", "fp8-block", torch.bfloat16, "composed"),
        ("cpu", "fp8-block", torch.bfloat16, "reference"),
    ],
)
def test_choice_on_described_devices(device_name, scheme, dtype, provider):
    operands = problem(4, 128, 128, scheme, torch.device("cpu"))
    assert choose(NAME, device_name, *operands, scheme, dtype) == provider


def test_the_cuda_product_is_offered_but_not_preferred_for_a_layer_alone():
    operands = problem(4, 128, 128, "fp8-block", torch.device("cpu"))
    choice = explain("block_linear", "sm90", *operands, "fp8-block", torch.bfloat16)
    assert choice.provider == "torch"
    assert choice.serving == ("torch", "triton", "cuda", "reference")
    uneven = problem(4, 192, 128, "fp8-block", torch.device("cpu"))
    choice = explain("block_linear", "sm90", *uneven, "fp8-block", torch.bfloat16)
    assert choice.passed_over["cuda"] == "its CUDA kernel takes multiples of 128 features, got 192"


def changed(**changes):
    """Arguments of a small valid call, in order, with changes."""
    q, q_scale, weight, weight_scale, _ = problem(4, 128, 256, "fp8-block", torch.device("cpu"))
    arguments = {
        "q": q,
        "q_scale": q_scale,
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": None,
        "scheme": "fp8-block",
        "dtype": torch.bfloat16,
    }
    return {**arguments, **changes}.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int8-block"}, "linear_gelu_quantize: int8-block takes q and weight in"),
        ({"scheme": "fp8"}, "unknown quantization scheme 'fp8'"),
        ({"dtype": torch.int8}, "linear_gelu_quantize: dtype must be"),
        ({"q_scale": torch.ones(4, 1)}, r"linear_gelu_quantize: q_scale must be float32 of shape"),
        ({"bias": torch.ones(130)}, r"linear_gelu_quantize: bias must have shape \(128,\)"),
        (
            {
                "weight": torch.ones(130, 256).to(torch.float8_e4m3fn),
                "weight_scale": torch.ones(2, 2),
            },
            "must be a multiple of 128, got 130",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=message):
        linear_gelu_quantize(*changed(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(128, 128, 128), (1, 128, 256), (777, 1536, 1536), (32760, 8960, 1536), (4096, 13824, 5120)],
)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_hoppers_fused_product(shape, bias_dtype, device):
    *operands, bias = problem(*shape, "fp8-block", device)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    args = (*operands, bias, "fp8-block", torch.bfloat16)
    skip_unless_served(NAME, "cuda", *args)
    q, scale = run_by("cuda", NAME, *args)
    expected = exact(*operands, bias, "fp8-block")
    rounded = dequantize_activation(
        *quantize_activation(expected.float(), "fp8-block"), "fp8-block"
    )
    values = dequantize_activation(q, scale, "fp8-block")
    # no further from the exact result than its own rounding to 8 bits
    assert relative_error(expected, values) < 1.02 * relative_error(expected, rounded) + 1e-4
