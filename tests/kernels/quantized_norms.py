"""Tests that hold for every operator that quantizes a norm, to be inherited in its test file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import turbo_opt.kernels
from tests.kernels import test_adaln, test_layer_norm
from tests.kernels.kernel_checks import (
    DTYPES,
    LEAST_SQNR_DB,
    TRITON_CHOICES,
    assert_opcheck,
    assert_quantized_alike,
    in_halves,
    modulation,
    run_by,
    skip_unless_served,
    sqnr_db,
)
from tests.kernels.test_gated_residual import definition as gated_sum
from tests.kernels.test_gated_residual import gate_of
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    choose,
    dequantize_activation,
    quantize_activation,
)

EPS = 1e-6
PROVIDERS = ["reference", "triton"]

# The models' own, and what is next to whole blocks of 128 rows, within and across batch entries.
GPU_SHAPES = [
    (1, 1, 256),
    (1, 127, 512),
    (1, 129, 2560),
    (2, 77, 1536),
    (3, 128, 3072),
    (1, 32760, 1536),
    (1, 75600, 5120),
]


class Norm(NamedTuple):
    """A norm without its quantization.

    Attributes:
        name: of its operator.
        definition: (x, first, second, eps) in float64.
        parameters: a kind of parameters, and x → two of them.
        usual_kind: the kind for tests that are about something else.
    """

    name: str
    definition: Callable[..., torch.Tensor]
    parameters: Callable[[str, torch.Tensor], tuple[torch.Tensor | None, ...]]
    usual_kind: str

    def usual(self, x):
        return self.parameters(self.usual_kind, x)


def adaln_parameters(kind, x):
    """Scale and shift."""
    return modulation(kind, x), modulation(kind, x)


def layer_norm_parameters(kind, x):
    """Weight and bias, as far as there are any."""
    weight, bias = torch.randn(2, x.shape[-1], device=x.device)
    return {"none": (None, None), "weight": (weight, None), "both": (weight, bias)}[kind]


ADALN = Norm("adaln", test_adaln.definition, adaln_parameters, "shared")
LAYER_NORM = Norm("layer_norm", test_layer_norm.definition, layer_norm_parameters, "both")


class QuantizedNormTests:
    """Of a norm and its quantization in one operator. A subclass gives the fixture `kind`."""

    name: str
    norm: Norm

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("shape", [(1, 1, 128), (2, 70, 384), (1, 129, 256)])
    def test_equals_norm_then_quantization_in_float32(self, provider, scheme, kind, shape, device):
        x = torch.randn(shape, device=device) * 2 + 1
        parameters = self.norm.parameters(kind, x)
        normalized = getattr(torch.ops.turbo_opt, self.norm.name)(x, *parameters, EPS)
        actual = run_by(provider, self.name, x, *parameters, EPS, scheme)
        assert_quantized_alike(quantize_activation(normalized, scheme), actual)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_nothing_is_rounded_to_the_input_dtype(self, dtype, scheme, device):
        x = torch.randn(2, 40, 256, device=device, dtype=dtype)
        rest = (*self.norm.usual(x), EPS, scheme)
        expected = run_by("reference", self.name, x.float(), *rest)
        for provider in PROVIDERS:
            assert_quantized_alike(expected, run_by(provider, self.name, x, *rest))

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_strided_input(self, provider, scheme, device):
        x = torch.randn(65, 2, 3, 128, device=device)[:, :, 1].transpose(0, 1)
        rest = (*self.norm.usual(x), EPS, scheme)
        expected = run_by("reference", self.name, x.contiguous(), *rest)
        assert_quantized_alike(expected, run_by(provider, self.name, x, *rest))

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_constant_rows_and_outliers_leave_no_nan(self, provider, scheme, device):
        x = torch.full((1, 130, 256), 3.0, device=device)
        x[0, 5, 7] = 1e15
        q, scale = run_by(provider, self.name, x, *self.norm.usual(x), EPS, scheme)
        assert q.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_opcheck(self, scheme, device):
        x = torch.randn(2, 5, 256, device=device)
        assert_opcheck(self.name, x, *self.norm.usual(x), EPS, scheme)

    def test_wrong_channels_and_schemes_are_named(self):
        x = torch.randn(1, 4, 200)
        operator, parameters = getattr(turbo_opt.kernels, self.name), self.norm.usual(x)
        with pytest.raises(OperatorInputError, match="multiple of 128, got 200"):
            operator(x, *parameters)
        with pytest.raises(OperatorInputError, match="did you mean 'fp8-block'"):
            operator(x, *parameters, EPS, "fp8-blok")

    @pytest.mark.parametrize(("device_name", "scheme", "provider"), TRITON_CHOICES)
    def test_choice_on_described_devices(self, device_name, scheme, provider):
        x = torch.empty(1, 9, 256)
        assert choose(self.name, device_name, x, *self.norm.usual(x), EPS, scheme) == provider

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_hopper_is_served_by_cuda_where_rows_fit_a_program(self, scheme):
        for channels, provider in ((256, "cuda"), (6144, "cuda"), (384, "triton")):
            x = torch.empty(1, 9, channels, dtype=torch.bfloat16)
            assert choose(self.name, "sm90", x, *self.norm.usual(x), EPS, scheme) == provider

    @pytest.mark.gpu
    @pytest.mark.parametrize("provider", ["cuda", "triton"])
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("shape", GPU_SHAPES)
    def test_bfloat16_on_the_gpu(self, provider, scheme, kind, shape, device):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        rest = (*self.norm.parameters(kind, x), EPS, scheme)
        skip_unless_served(self.name, provider, x, *rest)
        expected = run_by("reference", self.name, x, *rest)
        halves = in_halves(provider, scheme)
        assert_quantized_alike(expected, run_by(provider, self.name, x, *rest), halves=halves)

    @pytest.mark.gpu
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("shape", [(1, 20000, 1536), (1, 4000, 5120)])
    def test_a_mean_far_from_zero_costs_no_digits(self, scheme, kind, shape, device):
        """Several blocks for each cluster of programs, all of whose rows are measured again."""
        x = torch.randn(shape, device=device, dtype=torch.bfloat16) + 20
        rest = (*self.norm.parameters(kind, x), EPS, scheme)
        expected = run_by("reference", self.name, x, *rest)
        halves = in_halves("cuda", scheme)
        assert_quantized_alike(expected, run_by("cuda", self.name, x, *rest), halves=halves)

    @pytest.mark.gpu
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_strided_input_on_the_gpu(self, scheme, kind, device):
        wide = torch.randn(300, 2, 3, 512, device=device, dtype=torch.bfloat16)
        x = wide[:, :, 1].transpose(0, 1)
        rest = (*self.norm.parameters(kind, x), EPS, scheme)
        expected = run_by("reference", self.name, x.contiguous(), *rest)
        halves = in_halves("cuda", scheme)
        assert_quantized_alike(expected, run_by("cuda", self.name, x, *rest), halves=halves)

    @pytest.mark.gpu
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("times", [0.0, 1e-30, 1e-12])
    def test_a_gain_and_bias_next_to_zero_leave_a_scale(self, scheme, times, device):
        x = torch.randn(1, 300, 1536, device=device, dtype=torch.bfloat16)
        gain, bias = torch.randn(2, 1536, device=device) * times
        if self.norm is ADALN:  # its gain is one more, and next to −1 a float32 has no more digits
            gain = torch.full_like(gain, -1.0)
            gain, bias = gain.expand(1, 1, -1), bias.expand(1, 1, -1)
        rest = (gain, bias, EPS, scheme)
        expected = run_by("reference", self.name, x, *rest)
        halves = in_halves("cuda", scheme)
        assert_quantized_alike(expected, run_by("cuda", self.name, x, *rest), halves=halves)

    @pytest.mark.gpu
    @pytest.mark.parametrize("times", [1e-6, 1.0, 1e4])
    def test_sixteen_bits_before_int8_cost_less_than_a_tenth_of_a_decibel(
        self, times, kind, device
    ):
        """Whatever the size of gain and bias."""
        x = torch.randn(1, 3000, 1536, device=device, dtype=torch.bfloat16)
        parameters = [p if p is None else p * times for p in self.norm.parameters(kind, x)]
        if self.norm is ADALN:  # its gain is one more
            parameters[0] -= 1 - times
        exact = self.norm.definition(x.double(), *parameters, EPS)
        sqnr = {}
        for provider in ("reference", "cuda"):
            q, scale = run_by(provider, self.name, x, *parameters, EPS, "int8-block")
            sqnr[provider] = sqnr_db(exact, dequantize_activation(q, scale, "int8-block"))
        assert sqnr["cuda"] > sqnr["reference"] - 0.1


class ResidualQuantizedNormTests:
    """Of x' = x + y · gate and its quantized norm. A subclass gives the fixture `kinds`."""

    name: str
    norm: Norm

    def assert_both_results(self, result, x, y, gate, parameters, scheme, halves=False):
        """The stream is the rounded sum; what is quantized is the norm of the stream as rounded."""
        stream, *quantized = result
        assert stream.dtype is x.dtype
        assert sqnr_db(gated_sum(x, y, gate), stream) > LEAST_SQNR_DB[x.dtype]
        normalized = self.norm.definition(stream, *parameters, EPS)
        expected = quantize_activation(normalized.float(), scheme)
        assert_quantized_alike(expected, tuple(quantized), halves=halves)

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("shape", [(1, 1, 128), (2, 66, 256)])
    def test_equals_its_definition(self, provider, scheme, kinds, shape, device):
        x, y = torch.randn(2, *shape, device=device) * 2 + 1
        gate, parameters = gate_of(kinds[0], x), self.norm.parameters(kinds[1], x)
        result = run_by(provider, self.name, x, y, gate, *parameters, EPS, scheme)
        self.assert_both_results(result, x, y, gate, parameters, scheme)

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("channels", [128, 768])
    def test_the_norm_reads_the_stream_as_it_is_stored(
        self, provider, dtype, scheme, channels, device
    ):
        x, y = torch.randn(2, 2, 9, channels, device=device, dtype=dtype)
        gate, parameters = gate_of("per batch", x, dtype), self.norm.usual(x)
        result = run_by(provider, self.name, x, y, gate, *parameters, EPS, scheme)
        self.assert_both_results(result, x, y, gate, parameters, scheme)

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_strided_inputs(self, provider, scheme, device):
        x = torch.randn(65, 2, 3, 128, device=device)[:, :, 1].transpose(0, 1)
        y = torch.randn(2, 128, 65, device=device).mT
        gate = torch.randn(2, 6, 128, device=device).chunk(6, dim=1)[2]
        parameters = self.norm.usual(x)
        result = run_by(provider, self.name, x, y, gate, *parameters, EPS, scheme)
        self.assert_both_results(result, x, y, gate, parameters, scheme)

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_constant_rows_zero_rows_and_outliers_leave_no_nan(self, provider, scheme, device):
        x, y = torch.full((2, 1, 130, 256), 3.0, device=device)
        x[0, 64:], y[0, 64:] = 0, 0
        x[0, 5, 7], y[0, 6, 7] = 1e15, -1e15
        stream, q, scale = run_by(provider, self.name, x, y, None, *self.norm.usual(x), EPS, scheme)
        assert stream.isfinite().all() and q.float().isfinite().all()
        assert scale.isfinite().all() and (scale > 0).all()
        assert (stream[0, 64:] == 0).all()

    @pytest.mark.gpu
    @pytest.mark.parametrize("provider", ["cuda", "triton"])
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("gated", [False, True])
    def test_an_outlier_that_the_branch_cancels_costs_no_digits(
        self, provider, scheme, gated, device
    ):
        x, y = torch.randn(2, 1, 65, 1536, device=device, dtype=torch.bfloat16)
        x[..., 0], y[..., 0] = 3e4, -3e4
        gate = torch.ones(1, 1, 1536, device=device) if gated else None
        args = (x, y, gate, *self.norm.usual(x), EPS, scheme)
        skip_unless_served(self.name, provider, *args)
        result = run_by(provider, self.name, *args)
        halves = in_halves(provider, scheme)
        self.assert_both_results(result, x, y, gate, args[3:-2], scheme, halves)

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_no_tokens_give_no_tokens(self, provider, scheme, device):
        x = torch.randn(2, 0, 128, device=device)
        stream, q, scale = run_by(provider, self.name, x, x, None, *self.norm.usual(x), EPS, scheme)
        assert stream.shape == q.shape == (2, 0, 128) and scale.shape == (0, 1)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_opcheck(self, scheme, device):
        x, y = torch.randn(2, 2, 5, 256, device=device)
        assert_opcheck(self.name, x, y, gate_of("per batch", x), *self.norm.usual(x), EPS, scheme)

    @pytest.mark.parametrize(("device_name", "scheme", "provider"), TRITON_CHOICES)
    def test_choice_on_described_devices(self, device_name, scheme, provider):
        x = torch.empty(1, 9, 256)
        assert (
            choose(self.name, device_name, x, x, None, *self.norm.usual(x), EPS, scheme) == provider
        )

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_hopper_is_served_by_cuda(self, scheme):
        x = torch.empty(1, 9, 256, dtype=torch.bfloat16)
        args = (x, x, None, *self.norm.usual(x), EPS)
        assert choose(self.name, "sm90", *args, scheme) == "cuda"

    @pytest.mark.gpu
    @pytest.mark.parametrize("provider", ["cuda", "triton"])
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("shape", GPU_SHAPES)
    def test_bfloat16_on_the_gpu(self, provider, scheme, kinds, shape, device):
        x, y = torch.randn(2, *shape, device=device, dtype=torch.bfloat16)
        args = (x, y, gate_of(kinds[0], x), *self.norm.parameters(kinds[1], x), EPS, scheme)
        skip_unless_served(self.name, provider, *args)
        stream, *quantized = run_by(provider, self.name, *args)
        assert sqnr_db(run_by("reference", self.name, *args)[0], stream) > 50
        _, *expected = run_by("reference", self.name, stream, torch.zeros_like(x), None, *args[3:])
        halves = in_halves(provider, scheme)
        assert_quantized_alike(tuple(expected), tuple(quantized), halves=halves)
