"""linear_gelu_quantize(q, w) = gelu_quantize(block_linear(q, w)), without rounding in between."""

from __future__ import annotations

import importlib
import itertools
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

PROVIDERS = ["reference", "composed", "triton"]
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


def largest_error(provider, scheme, device):
    """Triton's interpreter truncates to e4m3, drops a carry, and so halves a few values."""
    truncated = provider == "triton" and scheme == "fp8-block" and device.type == "cpu"
    return 0.15 if truncated else LARGEST_ERROR[scheme]


def assert_close_to(expected, actual, scheme, error):
    """Scales as those of the exact values; what is quantized stands for them."""
    scale = quantize_activation(expected.float(), scheme)[1]
    torch.testing.assert_close(actual[1], scale, rtol=2e-3, atol=0)
    assert relative_error(expected, dequantize_activation(*actual, scheme)) < error


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 128, 128), (70, 256, 384), (129, 384, 128)])
def test_equals_gelu_of_the_exact_product_then_quantization(
    provider, with_bias, scheme, shape, device
):
    *operands, bias = problem(*shape, scheme, device)
    bias = bias if with_bias else None
    actual = run_by(provider, NAME, *operands, bias, scheme, torch.float32)
    expected = exact(*operands, bias, scheme)
    assert_close_to(expected, actual, scheme, largest_error(provider, scheme, device))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_that_do_not_exist_change_no_scale(provider, scheme, device):
    """GELU of the bias alone, which would stand there, is far above all that exists."""
    x = torch.rand(130, 128, device=device) * 0.1 + 0.9
    weight = torch.full((128, 128), -50 / 128, device=device)
    bias = torch.full((128,), 50.0, device=device)
    operands = *quantize_activation(x, scheme), *quantize_weight(weight, scheme)
    actual = run_by(provider, NAME, *operands, bias, scheme, torch.float32)
    expected = exact(*operands, bias, scheme)
    assert 0 < expected.abs().max() < 10
    assert_close_to(expected, actual, scheme, largest_error(provider, scheme, device))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_blocks_and_values_of_any_size_leave_no_nan(provider, scheme, device):
    q, q_scale, weight, weight_scale, _ = problem(256, 384, 256, scheme, device)
    bias = torch.zeros(384, device=device)
    weight[:128], bias[128:256] = torch.zeros_like(weight[:128]), -1e30
    weight_scale[2] *= 1e32
    actual = run_by(provider, NAME, q, q_scale, weight, weight_scale, bias, scheme, torch.float32)
    values = dequantize_activation(*actual, scheme)
    assert (actual[1] > 0).all() and values.isfinite().all()
    assert (values[:, :256] == 0).all()
    smallest = quantize_activation(torch.zeros(256, 256, device=device), scheme)[1]
    torch.testing.assert_close(actual[1][:, :2], smallest, rtol=1e-6, atol=0)
    expected = exact(q, q_scale, weight, weight_scale, bias, scheme)[:, 256:]
    assert expected.max() > 1e31
    last = actual[0][:, 256:], actual[1][:, 2:]
    assert_close_to(expected, last, scheme, largest_error(provider, scheme, device))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_outlier_sets_the_scale_of_its_own_block_only(provider, scheme, device):
    operands = problem(256, 256, 128, scheme, device)
    x = torch.randn(256, 128, device=device)
    x[3, 5] = 1e15
    operands = (*quantize_activation(x, scheme), *operands[2:])
    actual = run_by(provider, NAME, *operands, scheme, torch.float32)
    expected = exact(*operands, scheme)
    starts = {"int8-block": (0, 128, 256), "fp8-block": (0, 3, 4, 256)}[scheme]
    for start, stop in itertools.pairwise(starts):
        rows = slice(start, stop)
        scales = rows if scheme == "fp8-block" else slice(start // 128, stop // 128)
        part = actual[0][rows], actual[1][scales]
        error = largest_error(provider, scheme, device)
        assert_close_to(expected[rows], part, scheme, error)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_operands_and_a_bias_of_sixteen_bits(provider, scheme, device):
    q, q_scale, weight, weight_scale, bias = problem(70, 256, 256, scheme, device)
    bias = bias.bfloat16().float()
    args = (q, q_scale, weight, weight_scale, bias, scheme, torch.bfloat16)
    expected = run_by(provider, NAME, *args)
    strided = (
        q.t().contiguous().t(),
        q_scale.t().contiguous().t() if q_scale.is_contiguous() else q_scale.contiguous(),
        weight.t().contiguous().t(),
        weight_scale.t().contiguous().t(),
        bias.bfloat16().contiguous(),
    )
    actual = run_by(provider, NAME, *strided, scheme, torch.bfloat16)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("config", range(4))
def test_every_triton_configuration(scheme, tma, config, device, monkeypatch):
    module = importlib.import_module("turbo_opt.kernels.linear_gelu_quantize.triton")
    if tma and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA needs sm90")
    monkeypatch.setattr(module, "_tma_serves", lambda *matrices: tma)
    monkeypatch.setattr(module, "fastest", lambda problem, configs, launch: configs[config])
    *operands, bias = problem(300, 384, 256, scheme, device)
    actual = run_by("triton", NAME, *operands, bias, scheme, torch.float32)
    expected = exact(*operands, bias, scheme)
    assert_close_to(expected, actual, scheme, largest_error("triton", scheme, device))


def test_triton_is_tuned_apart_from_the_layer_alone(device, monkeypatch):
    problems = []

    def first(problem, configs, launch):
        problems.append(problem)
        return configs[0]

    args = (*problem(4, 128, 128, "int8-block", device), "int8-block", torch.float32)
    for name in ("block_linear", NAME):
        module = importlib.import_module(f"turbo_opt.kernels.{name}.triton")
        monkeypatch.setattr(module, "fastest", first)
        run_by("triton", name, *args)
    assert len(set(problems)) == 2


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
@pytest.mark.parametrize("provider", ["composed", "triton"])
def test_leading_dimensions_are_kept(provider, scheme, device):
    q, q_scale, *rest = problem(2 * 3 * 25, 256, 128, scheme, device)
    flat = run_by(provider, NAME, q, q_scale, *rest, scheme, torch.float32)
    deep = run_by(provider, NAME, q.view(2, 3, 25, 128), q_scale, *rest, scheme, torch.float32)
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
        ("sm90", "int8-block", torch.bfloat16, "triton"),
        ("sm89", "fp8-block", torch.bfloat16, "composed"),
        ("sm89", "int8-block", torch.bfloat16, "triton"),
        ("sm120", "fp8-block", torch.bfloat16, "composed"),
        ("sm120", "int8-block", torch.bfloat16, "triton"),
        ("sm100", "fp8-block", torch.bfloat16, "composed"),
        ("sm80", "int8-block", torch.float32, "triton"),
        ("sm75", "int8-block", torch.bfloat16, "composed"),
        ("cpu", "fp8-block", torch.bfloat16, "reference"),
        ("cpu", "int8-block", torch.float32, "composed"),
    ],
)
def test_choice_on_described_devices(device_name, scheme, dtype, provider):
    operands = problem(4, 128, 128, scheme, torch.device("cpu"))
    assert choose(NAME, device_name, *operands, scheme, dtype) == provider


@pytest.mark.parametrize(
    ("device_name", "scheme", "serving"),
    [
        ("sm90", "fp8-block", ("cuda", "composed", "triton", "reference")),
        ("sm90", "int8-block", ("triton", "composed", "reference")),
        ("sm89", "fp8-block", ("composed", "triton", "reference")),
        ("sm80", "int8-block", ("triton", "composed", "reference")),
        ("sm80", "fp8-block", ("composed", "reference")),
    ],
)
def test_triton_comes_first_in_int8_and_last_in_fp8(device_name, scheme, serving):
    operands = problem(4, 128, 128, scheme, torch.device("cpu"))
    assert explain(NAME, device_name, *operands, scheme, torch.bfloat16).serving == serving


def test_the_cuda_product_is_offered_but_not_preferred_for_a_layer_alone():
    operands = problem(4, 128, 128, "fp8-block", torch.device("cpu"))
    choice = explain("block_linear", "sm90", *operands, "fp8-block", torch.bfloat16)
    assert choice.provider == "torch"
    assert choice.serving == ("torch", "cuda", "triton", "reference")
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


def assert_no_further_than_rounding(provider, *args):
    """No further from the exact result than its own rounding to 8 bits."""
    *operands, scheme, _ = args
    values = dequantize_activation(*run_by(provider, NAME, *args), scheme)
    expected = exact(*operands, scheme)
    rounded = dequantize_activation(*quantize_activation(expected.float(), scheme), scheme)
    assert relative_error(expected, values) < 1.02 * relative_error(expected, rounded) + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "shape",
    [(128, 128, 128), (1, 128, 256), (777, 1536, 1536), (32760, 8960, 1536), (4096, 13824, 5120)],
)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_on_the_gpu(provider, scheme, shape, bias_dtype, device):
    *operands, bias = problem(*shape, scheme, device)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    args = (*operands, bias, scheme, torch.bfloat16)
    skip_unless_served(NAME, provider, *args)
    assert_no_further_than_rounding(provider, *args)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tritons_captured_graph_replays_on_new_data(scheme, device):
    args = (*problem(300, 384, 256, scheme, device), scheme, torch.bfloat16)
    skip_unless_served(NAME, "triton", *args)
    bias = args[4]
    with force_provider({NAME: "triton"}):
        linear_gelu_quantize(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = linear_gelu_quantize(*args)
        bias.normal_()
        graph.replay()
        for replayed, direct in zip(result, linear_gelu_quantize(*args), strict=True):
            assert torch.equal(replayed.float(), direct.float())
