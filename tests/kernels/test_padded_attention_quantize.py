"""padded_attention_quantize: padded_attention whose heads leave as e4m3."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import (
    assert_opcheck,
    assert_quantized_alike,
    relative_error,
    run_by,
)
from tests.kernels.test_padded_attention import DTYPES, exact, problem
from turbo_opt.kernels import (
    OperatorInputError,
    choose,
    dequantize_activation,
    padded_attention_quantize,
)

SCHEME = "fp8-block"


@pytest.mark.parametrize("provider", DTYPES)
@pytest.mark.parametrize("starts", [[40], [5, 98]], ids=str)
def test_heads_are_joined_and_each_has_a_scale(provider, starts, device):
    q, k, v, start = problem(DTYPES[provider], device, starts=starts)
    values, scale = run_by(provider, "padded_attention_quantize", q, k, v, start, None, SCHEME)
    joined = exact(q, k, v).transpose(1, 2).flatten(2)
    expected = joined.unflatten(-1, (-1, 128)).abs().amax(-1).flatten(0, 1) / 448
    torch.testing.assert_close(scale.double(), expected, rtol=5e-3, atol=0)
    # e4m3 loses 0.026; Triton's interpreter truncates, which loses twice as much.
    truncates = provider == "triton" and device.type == "cpu"
    found = dequantize_activation(values, scale, SCHEME)
    assert relative_error(joined, found) < (0.06 if truncates else 0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("faster", ["triton", "cuda"])
@pytest.mark.parametrize(("queries", "start"), [(32760, 120), (777, 511), (129, 0)])
def test_bfloat16_on_the_gpu(queries, start, faster):
    shape = {"keys": 512, "queries": queries, "heads": 3}
    arguments = problem(torch.bfloat16, torch.device("cuda"), starts=[start], **shape)
    results = [
        dequantize_activation(
            *run_by(provider, "padded_attention_quantize", *arguments, None, SCHEME), SCHEME
        )
        for provider in (faster, "reference")
    ]
    joined = exact(*arguments[:3]).transpose(1, 2).flatten(2)
    errors = [relative_error(joined, result) for result in results]
    assert errors[0] < 1.02 * errors[1] < 0.03


def test_the_reference_rounds_once(device):
    q, k, v, start = problem(torch.float32, torch.device("cpu"), starts=[7])
    values = run_by("reference", "padded_attention_quantize", q, k, v, start, None, SCHEME)
    attention = run_by("reference", "padded_attention", q, k, v, start, None)
    joined = attention.transpose(1, 2).flatten(2)
    assert_quantized_alike(run_by("reference", "quantize_activation", joined, SCHEME), values)


def test_the_operator_is_sound(device):
    arguments = problem(torch.float16, device, starts=[3], keys=9, queries=5)
    assert_opcheck("padded_attention_quantize", *arguments, None, SCHEME)


@pytest.mark.parametrize(
    ("device", "dtype", "provider"),
    [
        ("sm90", torch.bfloat16, "cuda"),
        ("sm90", torch.float16, "triton"),
        ("sm89", torch.bfloat16, "triton"),
        ("sm80", torch.float16, "reference"),
    ],
)
def test_who_serves(device, dtype, provider):
    arguments = problem(dtype, torch.device("cpu"), starts=[1], keys=2, queries=2)
    assert choose("padded_attention_quantize", device, *arguments, None, SCHEME) == provider


@pytest.mark.parametrize(
    ("head_dim", "scheme", "message"),
    [
        (128, "int8-block", "spans more tokens"),
        (64, SCHEME, "one group of 128 channels, got 64"),
        (128, "fp8", "fp8-block"),
    ],
)
def test_what_is_refused(head_dim, scheme, message):
    heads, start = torch.ones(1, 2, 9, head_dim), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(OperatorInputError, match=message):
        padded_attention_quantize(heads, heads, heads, start, None, scheme)
