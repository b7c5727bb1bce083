"""norm_rope_sagesla_quantize(q, k, v) = quantize_activation(norm_rope_sagesla(q, k, v))."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import (
    BLOCKS,
    highest_blocks,
    masked_attention,
    projection,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by, skip_unless_served
from tests.kernels.test_norm_rope_sagesla import (
    arguments,
    flat,
    normalized_heads,
    parts_of_one_product,
)
from tests.kernels.test_sagesla import DTYPES, GPU_SHAPES, PROVIDERS
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    choose,
    dequantize_activation,
    explain,
    norm_rope_sagesla_quantize,
)

NAME = "norm_rope_sagesla_quantize"
# Relative to attention in float64: what q and k in int8 lose, and the rounding of the result.
LARGEST_ERROR = {"int8-block": 0.025, "fp8-block": 0.035}
TRUNCATED = 2  # times as much where Triton's interpreter truncates to fp8 instead of rounding
LARGEST_ON_GPU = 0.045  # with P in fp8, which is rounded relative to the maximum so far


def widened(args):
    """The same arguments, 16-bit tensors as float32: attention then is not rounded at its end."""
    return tuple(x.float() if isinstance(x, torch.Tensor) else x for x in args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_attention_in_float32_is_quantized_without_rounding_to_16_bits(dtype, scheme, device):
    projections = parts_of_one_product(2, 2, 130, dtype, device)
    args = (*projections, *projection(device), 0.5, 64, 128, "softmax", "fp8")
    q, scale = run_by("reference", NAME, *args, scheme)
    wide = run_by("reference", "norm_rope_sagesla", *widened(args))
    expected_q, expected_scale = run_by("reference", "quantize_activation", wide, scheme)
    assert torch.equal(q.float(), expected_q.float()) and torch.equal(scale, expected_scale)
    narrow = run_by("reference", "norm_rope_sagesla", *args)
    _, its_scale = run_by("reference", "quantize_activation", narrow, scheme)
    assert torch.equal(its_scale, scale) == (dtype is torch.float32)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_values_times_scales_are_close_to_attention_in_float64(provider, scheme, blocks, device):
    projections = parts_of_one_product(2, 1, 80, DTYPES[provider], device)
    q, k, v = normalized_heads(*projections)
    expected = flat(masked_attention(q, k, v, highest_blocks(q, k, 0.5, *blocks), *blocks))
    args = (*projections, None, None, 0.5, *blocks, "softmax", "16bit", scheme)
    actual = dequantize_activation(*run_by(provider, NAME, *args), scheme)
    truncates = provider == "triton" and scheme == "fp8-block" and device.type == "cpu"
    bound = LARGEST_ERROR[scheme] * (TRUNCATED if truncates else 1)
    assert relative_error(expected, actual) < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_triton_gives_what_its_two_passes_give(scheme, device):
    projections = parts_of_one_product(2, 1, 65, torch.float16, device)
    args = (*projections, None, None, 0.5, 64, 128, "softmax", "16bit")
    attended = run_by("triton", "norm_rope_sagesla", *args)
    expected_q, expected_scale = run_by("triton", "quantize_activation", attended, scheme)
    q, scale = run_by("triton", NAME, *args, scheme)
    assert torch.equal(q.float(), expected_q.float()) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_values_of_zero_leave_no_nan(provider, device):
    q, k, v, *rest = parts_of_one_product(1, 1, 70, DTYPES[provider], device)
    settings = (None, None, 1.0, 64, 128, "softmax", "fp8", "fp8-block")
    values, scale = run_by(provider, NAME, q, k, torch.zeros_like(v), *rest, *settings)
    assert (values.float() == 0).all() and (scale > 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("batch", "length"), [(0, 70), (1, 0)])
def test_no_tokens_give_no_tokens(provider, batch, length, device):
    projections = parts_of_one_product(batch, 2, length, torch.float16, device)
    args = (*projections, *projection(device), 0.5, 64, 128, "softmax", "fp8", "fp8-block")
    values, scale = run_by(provider, NAME, *args)
    assert values.shape == (batch, length, 256) and scale.shape == (0, 2)


def test_opcheck(device):
    projections = parts_of_one_product(1, 1, 70, torch.float16, device)
    args = (*projections, None, None, 0.5, 64, 128, "softmax", "fp8", "fp8-block")
    assert_opcheck(NAME, *args)


@pytest.mark.parametrize(
    ("device_name", "changes", "scheme", "provider"),
    [
        ("sm90", {}, "fp8-block", "cuda"),
        ("sm90", {}, "int8-block", "triton"),
        ("sm90", {"dtype": torch.float16}, "fp8-block", "triton"),
        ("sm90", {"block_k": 64}, "fp8-block", "triton"),
        ("sm90", {"dtype": torch.float32}, "fp8-block", "reference"),
        ("sm89", {}, "fp8-block", "triton"),
        ("sm120", {}, "int8-block", "triton"),
        ("sm80", {"pv": "16bit"}, "int8-block", "triton"),
        ("sm80", {"pv": "16bit"}, "fp8-block", "reference"),
        ("sm80", {}, "int8-block", "reference"),
        ("cpu", {}, "fp8-block", "reference"),
    ],
)
def test_choice_on_described_devices(device_name, changes, scheme, provider):
    assert choose(NAME, device_name, *arguments(**changes), scheme) == provider


def test_what_is_not_served_is_refused_with_the_reason():
    refused = explain(NAME, "sm90", *arguments(), "int8-block").passed_over
    assert refused["cuda"] == "it writes groups of one token, 'int8-block' has blocks of 128"
    refused = explain(NAME, "sm80", *arguments(pv="16bit"), "fp8-block").passed_over
    assert refused["triton"] == "fp8-block needs sm89 or newer"
    assert (
        "sm90's tensor cores"
        in explain(NAME, "sm89", *arguments(), "fp8-block").passed_over["cuda"]
    )


def test_heads_of_another_size_may_share_a_group(device):
    """What it means does not depend on one head being one group; only the CUDA kernel does."""
    x = torch.randn(3, 1, 70, 128, device=device)
    tables = torch.randn(2, 1, 70, 1, 32, device=device)
    args = (*x, None, None, *tables, 1e-6, None, None, 0.5, 64, 128, "softmax", "16bit")
    actual = run_by("reference", NAME, *args, "fp8-block")
    attended = run_by("reference", "norm_rope_sagesla", *args)
    expected = run_by("reference", "quantize_activation", attended, "fp8-block")
    assert torch.equal(actual[0].float(), expected[0].float())
    assert "128 channels" in explain(NAME, "sm90", *args, "fp8-block").passed_over["cuda"]


@pytest.mark.parametrize(
    ("changes", "scheme", "message"),
    [
        ({"q": torch.ones(300, 256).bfloat16()}, "fp8-block", f"{NAME}: x must have 3 dimensions"),
        ({"q_weight": torch.ones(128)}, "fp8-block", rf"{NAME}: weight must have shape \(256,\)"),
        ({"proj_weight": None}, "fp8-block", f"{NAME}: proj_bias is given without proj_weight"),
        ({"pv": "bf16"}, "fp8-block", f"{NAME}: pv must be 'fp8' or '16bit', got 'bf16'"),
        ({}, "fp8_block", "'fp8_block': did you mean 'fp8-block'"),
    ],
)
def test_wrong_arguments_are_named(changes, scheme, message):
    with pytest.raises(OperatorInputError, match=message):
        norm_rope_sagesla_quantize(*arguments(**changes), scheme)


def test_channels_must_be_whole_groups():
    x, table = torch.ones(1, 70, 192), torch.ones(1, 70, 1, 32)
    with pytest.raises(OperatorInputError, match="multiple of 128, got 192"):
        norm_rope_sagesla_quantize(x, x, x, None, None, table, table)


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads", "topk"), GPU_SHAPES)
def test_bfloat16_on_the_gpu(provider, scheme, projected, batch, length, heads, topk, device):
    projections = parts_of_one_product(batch, heads, length, torch.bfloat16, device)
    weight, bias = projection(device) if projected else (None, None)
    args = (*projections, weight, bias, topk, 64, 128, "softmax", "fp8")
    skip_unless_served(NAME, provider, *args, scheme)
    expected = run_by("reference", "norm_rope_sagesla", *widened(args))
    actual = dequantize_activation(*run_by(provider, NAME, *args, scheme), scheme)
    assert relative_error(expected, actual) < LARGEST_ON_GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length", "heads", "topk"), GPU_SHAPES)
def test_cuda_differs_from_its_two_passes_by_a_16_bit_rounding(batch, length, heads, topk, device):
    """The same sums; a scale moves by half a step of bfloat16, some values to a neighbour."""
    projections = parts_of_one_product(batch, heads, length, torch.bfloat16, device)
    args = (*projections, *projection(device), topk, 64, 128, "softmax", "fp8")
    skip_unless_served(NAME, "cuda", *args, "fp8-block")
    attended = run_by("cuda", "norm_rope_sagesla", *args)
    expected = run_by("reference", "quantize_activation", attended, "fp8-block")
    actual = run_by("cuda", NAME, *args, "fp8-block")
    torch.testing.assert_close(actual[1], expected[1], rtol=2.0**-8, atol=0)
    pair = (dequantize_activation(*each, "fp8-block") for each in (expected, actual))
    assert relative_error(*pair) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
def test_a_captured_graph_replays_to_the_same_bits(provider, device):
    projections = parts_of_one_product(2, 2, 777, torch.bfloat16, device)
    args = (*projections, *projection(device), 0.4, 64, 128, "softmax", "fp8", "fp8-block")
    skip_unless_served(NAME, provider, *args)

    def step():
        return run_by(provider, NAME, *args)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, scale = step()
    for _ in range(2):
        args[0].normal_()
        graph.replay()
        expected_values, expected_scale = step()
        assert torch.equal(values.float(), expected_values.float())
        assert torch.equal(scale, expected_scale)
