"""linear_gated_residual(q, w, x, gate) = x + block_linear(q, w) · gate, rounded once."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_checks import (
    DTYPES,
    LEAST_SQNR_DB,
    assert_opcheck,
    run_by,
    skip_unless_served,
    sqnr_db,
)
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    choose,
    dequantize_activation,
    dequantize_weight,
    explain,
    force_provider,
    linear_gated_residual,
    quantize_activation,
    quantize_weight,
)

NAME = "linear_gated_residual"
PROVIDERS = ["reference", "triton", "composed"]
GATES = ["none", "shared", "per batch", "per token"]
# Hopper's fp8 units keep 14 bits within a block of K: 75 dB of the sum of branch and stream.
LEAST_DB = {**LEAST_SQNR_DB, torch.float32: 70.0, torch.float16: 64.0}


def problem(shape, scheme, device, dtype=torch.float32):
    """Operands whose scales differ from block to block, a bias, and a stream of the same size."""
    batch, length, out_features, in_features = shape
    activation = torch.randn(batch, length, in_features, device=device)
    activation *= torch.logspace(-1, 1, in_features, device=device)
    weight = torch.randn(out_features, in_features, device=device) / in_features**0.5
    bias = torch.randn(out_features, device=device)
    x = torch.randn(batch, length, out_features, device=device, dtype=dtype)
    return (*quantize_activation(activation, scheme), *quantize_weight(weight, scheme), bias, x)


def gate_of(kind, x, dtype=torch.float32):
    batch, length, channels = x.shape
    if kind == "none":
        return None
    shape = {"shared": (1, 1), "per batch": (batch, 1), "per token": (batch, length)}[kind]
    return torch.randn(*shape, channels, device=x.device, dtype=dtype)


def definition(q, q_scale, weight, weight_scale, bias, x, gate, scheme):
    y = dequantize_activation(q, q_scale, scheme).double()
    y = y @ dequantize_weight(weight, weight_scale).double().T
    y = y if bias is None else y + bias.double()
    return x.double() + (y if gate is None else y * gate.double())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_its_definition(provider, dtype, kind, scheme, device):
    *operands, bias, x = problem((2, 70, 320, 256), scheme, device, dtype)
    bias = None if kind == "per batch" else bias
    args = (*operands, bias, x, gate_of(kind, x), scheme)
    result = run_by(provider, NAME, *args)
    assert result.dtype is dtype
    twice = 6 if provider == "composed" and dtype is not torch.float32 else 0  # rounded twice
    assert sqnr_db(definition(*args), result) > LEAST_DB[dtype] - twice


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 150),
    out_features=st.integers(1, 300),
    groups=st.integers(1, 3),
    kind=st.sampled_from(GATES),
    scheme=st.sampled_from(sorted(SCHEMES)),
    seed=st.integers(0, 2**31),
)
def test_any_size(device, batch, length, out_features, groups, kind, scheme, seed):
    torch.manual_seed(seed)
    *operands, x = problem((batch, length, out_features, 128 * groups), scheme, device)
    args = (*operands, x, gate_of(kind, x), scheme)
    for provider in PROVIDERS:
        assert sqnr_db(definition(*args), run_by(provider, NAME, *args)) > 70, provider


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_streams_and_a_chunk_of_the_modulation(provider, device):
    *operands, x = problem((2, 9, 256, 128), "int8-block", device)
    gate = torch.randn(2, 6, 256, device=device).chunk(6, dim=1)[2]
    args = (*operands, x.mT.contiguous().mT, gate, "int8-block")
    assert sqnr_db(definition(*args), run_by(provider, NAME, *args)) > 70


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_gate_of_zeros_keeps_the_stream_and_does_not_write_it(provider, device):
    *operands, x = problem((1, 20, 256, 128), "fp8-block", device)
    before = x.clone()
    result = run_by(
        provider, NAME, *operands, x, torch.zeros(1, 1, 256, device=device), "fp8-block"
    )
    assert torch.equal(result, x) and torch.equal(x, before)
    assert result.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_tokens(provider, device):
    q, q_scale, *rest, x = problem((1, 4, 256, 128), "fp8-block", device)
    empty = (q[:, :0], q_scale[:0], *rest, x[:, :0], None, "fp8-block")
    assert run_by(provider, NAME, *empty).shape == (1, 0, 256)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    *operands, x = problem((2, 4, 128, 256), scheme, device, torch.bfloat16)
    assert_opcheck(NAME, *operands, x, gate_of("shared", x), scheme)


def test_the_sum_is_rounded_once_unless_it_is_composed(device):
    *operands, bias, x = problem((1, 64, 256, 128), "int8-block", device, torch.float16)
    args = (*operands, bias, x * 1e-3, gate_of("shared", x), "int8-block")
    rounded = definition(*args).half()
    once, twice = (run_by(name, NAME, *args) for name in ("reference", "composed"))
    assert (once == rounded).float().mean() > 0.999 > 0.95 > (twice == rounded).float().mean()


def test_composed_runs_the_two_operators_as_they_are_forced(device):
    *operands, x = problem((1, 8, 128, 256), "int8-block", device)
    args = (*operands, x, gate_of("per token", x), "int8-block")
    with force_provider({"block_linear": "reference", "gated_residual": "reference"}):
        assert torch.equal(run_by("reference", NAME, *args), run_by("composed", NAME, *args))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("config", range(4))
def test_every_triton_configuration(scheme, tma, config, device, monkeypatch):
    module = importlib.import_module("turbo_opt.kernels.block_linear.triton")
    if tma and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA needs sm90")
    monkeypatch.setattr(module, "_tma_serves", lambda *matrices: tma)
    monkeypatch.setattr(module, "fastest", lambda problem, configs, launch: configs[config])
    *operands, x = problem((2, 75, 384, 128), scheme, device)
    args = (*operands, x, gate_of("per batch", x), scheme)
    assert sqnr_db(definition(*args), run_by("triton", NAME, *args)) > 70


def test_configurations_are_measured_apart_for_each_kind_of_epilogue(device, monkeypatch):
    module = importlib.import_module("turbo_opt.kernels.block_linear.triton")
    problems = []

    def first(problem, configs, launch):
        problems.append(problem)
        return configs[0]

    monkeypatch.setattr(module, "fastest", first)
    *operands, x = problem((2, 4, 128, 128), "int8-block", device)
    run_by("triton", "block_linear", *operands, "int8-block", torch.float32)
    for kind in GATES[:3]:
        run_by("triton", NAME, *operands, x, gate_of(kind, x), "int8-block")
    assert len(set(problems)) == 4


@pytest.mark.parametrize(
    ("device_name", "scheme", "dtype", "out_features", "provider"),
    [
        ("sm90", "fp8-block", torch.bfloat16, 128, "cuda"),
        ("sm90", "fp8-block", torch.bfloat16, 192, "triton"),
        ("sm90", "fp8-block", torch.float16, 128, "triton"),
        ("sm90", "int8-block", torch.bfloat16, 128, "triton"),
        ("sm89", "fp8-block", torch.bfloat16, 128, "triton"),
        ("sm80", "fp8-block", torch.bfloat16, 128, "composed"),
        ("sm120", "int8-block", torch.bfloat16, 128, "triton"),
        ("cpu", "fp8-block", torch.bfloat16, 128, "reference"),
        ("cpu", "int8-block", torch.bfloat16, 128, "composed"),
    ],
)
def test_choice_on_described_devices(device_name, scheme, dtype, out_features, provider):
    *operands, x = problem((1, 4, out_features, 128), scheme, torch.device("cpu"), dtype)
    assert choose(NAME, device_name, *operands, x, None, scheme) == provider


def test_what_the_cuda_kernel_lacks_is_said():
    *operands, x = problem((1, 4, 128, 128), "fp8-block", torch.device("cpu"))
    choice = explain(NAME, "sm90", *operands, x, None, "fp8-block")
    assert choice.passed_over["cuda"] == (
        "its CUDA kernel has results of bfloat16, not torch.float32"
    )


def changed(**changes):
    """Arguments of a small valid call, in order, with changes."""
    *operands, _, x = problem((1, 4, 130, 256), "fp8-block", torch.device("cpu"), torch.bfloat16)
    names = ("q", "q_scale", "weight", "weight_scale")
    arguments = dict(zip(names, operands, strict=True))
    arguments.update(bias=None, x=x, gate=None, scheme="fp8-block")
    return {**arguments, **changes}.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "int8-block"}, "int8-block takes q and weight in torch.int8"),
        ({"q_scale": torch.ones(4, 1)}, r"q_scale must be float32 of shape \(4, 2\)"),
        ({"bias": torch.ones(131)}, r"bias must have shape \(130,\)"),
        ({"bias": torch.ones(130).half()}, "bias must be float32 or torch.bfloat16"),
        ({"x": torch.ones(1, 4, 130).double()}, "x must be bfloat16, float16 or float32"),
        ({"x": torch.ones(4, 130)}, "x must have 3 dimensions"),
        ({"x": torch.ones(1, 4, 128)}, r"got \(1, 4, 128\) where that is \(1, 4, 130\)"),
        ({"x": torch.ones(2, 2, 130)}, r"got \(2, 2, 130\) where that is \(1, 4, 130\)"),
        ({"gate": torch.ones(1, 3, 130)}, "gate must have shape"),
        ({"gate": torch.ones(1, 1, 130).half()}, "gate must be float32 or torch.bfloat16 as x is"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^{NAME}: .*{message}"):
        linear_gated_residual(*changed(**changes))


def test_tokens_and_batch_in_one_dimension_are_refused():
    q = torch.ones(4, 256).to(torch.float8_e4m3fn)
    with pytest.raises(OperatorInputError, match=r"where that is \(4, 130\)"):
        linear_gated_residual(*changed(q=q))


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton", "composed"])
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 128, 128), (2, 777, 1536, 1536), (2, 129, 384, 1152), (1, 4095, 5120, 1280)],
)
def test_on_the_gpu(provider, kind, bias_dtype, shape, device):
    *operands, bias, x = problem(shape, "fp8-block", device, torch.bfloat16)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    for gate_dtype in (torch.float32, torch.bfloat16):
        args = (*operands, bias, x, gate_of(kind, x, gate_dtype), "fp8-block")
        skip_unless_served(NAME, provider, *args)
        assert sqnr_db(definition(*args), run_by(provider, NAME, *args)) > 45


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton", "composed"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"),
    [(32760, 1536, 1536), (32760, 8960, 1536), (4090, 5120, 5120), (4090, 13824, 5120)],
)
def test_real_shapes(provider, scheme, tokens, in_features, out_features, device):
    shape = (1, tokens, out_features, in_features)
    *operands, bias, x = problem(shape, scheme, device, torch.bfloat16)
    args = (*operands, bias.bfloat16(), x, gate_of("shared", x), scheme)
    skip_unless_served(NAME, provider, *args)
    expected = run_by("reference", NAME, *args)
    assert sqnr_db(expected, run_by(provider, NAME, *args)) > 45


@pytest.mark.gpu
def test_a_captured_graph_replays_on_new_data(device):
    *operands, x = problem((1, 300, 256, 1152), "fp8-block", device, torch.bfloat16)
    args = (*operands, x, gate_of("shared", x), "fp8-block")
    linear_gated_residual(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = linear_gated_residual(*args)
    x.normal_()
    graph.replay()
    assert torch.equal(result, linear_gated_residual(*args))
