"""block_linear(q, w) = dequant(q) · dequant(w)ᵀ + bias."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    block_linear,
    dequantize_activation,
    dequantize_weight,
    explain,
    quantize_activation,
    quantize_weight,
)

# Against the unquantized product, on Gaussian data.
LARGEST_ERROR = {"int8-block": 0.015, "fp8-block": 0.04}
# Against the product of the dequantized operands: float32 sums in another order; Hopper's fp8 units
# keep 14 bits within a block of K; and the rounding of the result.
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 8e-4}


def problem(tokens, out_features, in_features, scheme, device, dtype=torch.float32):
    x = torch.randn(tokens, in_features, device=device, dtype=dtype)
    weight = torch.randn(out_features, in_features, device=device) / in_features**0.5
    operands = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    return operands, x.double() @ weight.double().T


def exact_product(operands, bias, scheme):
    q, q_scale, weight, weight_scale = operands
    x = dequantize_activation(q, q_scale, scheme).double()
    y = x @ dequantize_weight(weight, weight_scale).double().T
    return y if bias is None else y + bias.double()


def providers_for(operands, bias, scheme, dtype):
    choice = explain("block_linear", operands[0].device, *operands, bias, scheme, dtype)
    usable = [name for name, why in choice.passed_over.items() if why.startswith("works")]
    return [choice.provider, *usable]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 128), (130, 320, 256), (64, 256, 384)])
def test_every_provider_equals_the_exact_product(scheme, dtype, with_bias, shape, device):
    operands, _ = problem(*shape, scheme, device)
    bias = torch.randn(shape[1], device=device) if with_bias else None
    expected = exact_product(operands, bias, scheme)
    for provider in providers_for(operands, bias, scheme, dtype):
        y = run_by(provider, "block_linear", *operands, bias, scheme, dtype)
        truncated = 2 if provider == "triton" and device.type == "cpu" else 1  # the interpreter
        assert relative_error(expected, y) < ROUNDING[dtype] * truncated, provider


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bias_may_be_every_second_value_of_a_tensor(scheme, device):
    operands, _ = problem(132, 256, 256, scheme, device)
    bias = torch.randn(512, device=device)[::2]
    expected = exact_product(operands, bias, scheme)
    for provider in providers_for(operands, bias, scheme, torch.float32):
        y = run_by(provider, "block_linear", *operands, bias, scheme, torch.float32)
        assert relative_error(expected, y) < ROUNDING[torch.float32], provider


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantization_error_on_gaussian_data(scheme, device):
    operands, unquantized = problem(256, 256, 512, scheme, device)
    for provider in providers_for(operands, None, scheme, torch.bfloat16):
        y = run_by(provider, "block_linear", *operands, None, scheme, torch.bfloat16)
        assert relative_error(unquantized, y) < LARGEST_ERROR[scheme], provider


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_are_right_up_to_the_range_of_float32(scheme, device):
    x = torch.full((4, 256), 1e36, device=device)
    weight = torch.ones(8, 256, device=device)
    weight[:, ::2] = -1  # so that what is left is small beside the partial sums
    operands = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    expected = exact_product(operands, None, scheme)
    for provider in providers_for(operands, None, scheme, torch.bfloat16):
        y = run_by(provider, "block_linear", *operands, None, scheme, torch.bfloat16)
        assert (y - expected).abs().max() < 4e-3 * 256 * 1e36, provider


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("config", range(4))
def test_every_triton_configuration(scheme, tma, config, device, monkeypatch):
    module = importlib.import_module("turbo_opt.kernels.block_linear.triton")
    if tma and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA needs sm90")
    monkeypatch.setattr(module, "_tma_serves", lambda *matrices: tma)
    monkeypatch.setattr(module, "fastest", lambda problem, configs, launch: configs[config])
    operands, _ = problem(300, 384, 256, scheme, device)
    bias = torch.randn(384, device=device)
    y = run_by("triton", "block_linear", *operands, bias, scheme, torch.float32)
    expected = exact_product(operands, bias, scheme)
    assert relative_error(expected, y) < ROUNDING[torch.float32]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leading_dimensions_and_scales_that_differ_per_block(scheme, device):
    x = torch.randn(2, 3, 50, 384, device=device) * torch.logspace(-3, 3, 384, device=device)
    weight = (
        torch.randn(256, 384, device=device) * torch.logspace(2, -2, 256, device=device)[:, None]
    )
    operands = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    expected = exact_product(operands, None, scheme)
    for provider in providers_for(operands, None, scheme, torch.bfloat16):
        y = run_by(provider, "block_linear", *operands, None, scheme, torch.bfloat16)
        assert y.shape == (2, 3, 50, 256)
        difference, rows = (y.double() - expected).reshape(-1, 256), expected.reshape(-1, 256)
        by_feature = difference.norm(dim=0) / rows.norm(dim=0)
        assert by_feature.max() < 2 * ROUNDING[torch.bfloat16], provider


@pytest.mark.parametrize("scheme", SCHEMES)
def test_row_major_activation_scales_serve_too(scheme, device):
    (q, q_scale, *weight), _ = problem(128, 128, 256, scheme, device)
    expected = exact_product((q, q_scale, *weight), None, scheme)
    operands = (q, q_scale.contiguous(), *weight)
    for provider in providers_for(operands, None, scheme, torch.bfloat16):
        y = run_by(provider, "block_linear", *operands, None, scheme, torch.bfloat16)
        assert relative_error(expected, y) < 2 * ROUNDING[torch.bfloat16], provider


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    operands, _ = problem(8, 128, 256, scheme, device)
    bias = torch.randn(128, device=device)
    assert_opcheck("block_linear", *operands, bias, scheme, torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_export_of_a_quantized_linear_keeps_tokens_dynamic(scheme, tmp_path):
    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            weight, scale = quantize_weight(torch.randn(64, 256), scheme)
            self.register_buffer("weight", weight)
            self.register_buffer("scale", scale)

        def forward(self, x):
            q, q_scale = quantize_activation(x, scheme)
            return block_linear(q, q_scale, self.weight, self.scale, None, scheme, x.dtype)

    # More than 128 tokens: torch.export tells one block of rows from several (ceil(M / 128) == 1),
    # so a program traced with several int8 blocks serves several only.
    module = Quantized()
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(
        module, (torch.randn(2, 70, 256),), dynamic_shapes=(dynamic,), strict=False
    )
    torch.export.save(program, tmp_path / "linear.pt2")
    loaded = torch.export.load(tmp_path / "linear.pt2").module()
    x = torch.randn(3, 110, 256)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)


def changed(**changes):
    """Arguments of a small valid call, in order, with changes."""
    q, q_scale = quantize_activation(torch.randn(4, 256), "int8-block")
    weight, weight_scale = quantize_weight(torch.randn(130, 256), "int8-block")
    arguments = {
        "q": q,
        "q_scale": q_scale,
        "weight": weight,
        "weight_scale": weight_scale,
        "bias": None,
        "scheme": "int8-block",
        "dtype": torch.bfloat16,
    }
    return {**arguments, **changes}.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "fp8-block"}, "takes q and weight in torch.float8_e4m3fn"),
        ({"scheme": "int4"}, "unknown quantization scheme 'int4'"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"q_scale": torch.ones(4, 2)}, r"q_scale must be float32 of shape \(1, 2\)"),
        ({"weight_scale": torch.ones(1, 2)}, r"weight_scale must be float32 of shape \(2, 2\)"),
        ({"bias": torch.ones(131)}, r"bias must have shape \(130,\)"),
        ({"bias": torch.ones(130).half()}, "bias must be float32 or torch.bfloat16"),
        ({"q": torch.ones(4, 128, dtype=torch.int8)}, r"q must be \(…, K\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=message):
        block_linear(*changed(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"),
    [(32760, 1536, 1536), (32760, 8960, 1536), (4090, 5120, 13824), (75600, 5120, 5120)],
)
def test_real_shapes(scheme, tokens, in_features, out_features, device):
    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, device=device) / in_features**0.5
    bias = torch.randn(out_features, device=device)
    operands = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    expected = run_by("reference", "block_linear", *operands, bias, scheme, torch.bfloat16)
    for provider in providers_for(operands, bias, scheme, torch.bfloat16):
        y = run_by(provider, "block_linear", *operands, bias, scheme, torch.bfloat16)
        assert relative_error(expected, y) < 2 * ROUNDING[torch.bfloat16], provider


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_captured_graph_replays_on_new_data(scheme, device):
    operands, _ = problem(300, 256, 256, scheme, device)
    x = torch.randn(300, 256, device=device)

    def step():
        q, q_scale = quantize_activation(x, scheme)
        return block_linear(q, q_scale, *operands[2:], None, scheme, torch.bfloat16)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, step(), rtol=0, atol=0)
