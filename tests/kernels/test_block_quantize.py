"""quantize(v) = round_half_even(v / scale), scale = max(amax of the block, 1e-8) / divisor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_checks import (
    DTYPES,
    assert_opcheck,
    assert_quantized_alike,
    run_by,
    sqnr_db,
)
from turbo_opt.kernels import (
    SCHEMES,
    OperatorInputError,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from turbo_opt.kernels.block_quantize import reference

# A uniform step of amax/128 under a Gaussian of 16,384 values leaves about 40 dB less the crest
# (12 dB); e4m3's three mantissa bits leave about 31.5 dB.
LEAST_SQNR_DB = {"int8-block": 38.0, "fp8-block": 31.0}


def definition(x, scheme):
    """Block by block, in float64."""
    rules = SCHEMES[scheme]
    values = x.double().reshape(-1, x.shape[-1])
    side = rules.activation_block[0]
    q = torch.empty_like(values)
    scale = values.new_empty((-(-values.shape[0] // side), values.shape[1] // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = slice(i * side, (i + 1) * side), slice(j * 128, (j + 1) * 128)
            scale[i, j] = max(values[where].abs().max().item(), 1e-8) / rules.divisor
            q[where] = values[where] / scale[i, j]
    if scheme == "int8-block":
        return q.round().clamp(-128, 127).reshape(x.shape), scale
    return q.float().to(torch.float8_e4m3fn).double().reshape(x.shape), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(128,), (130, 128), (2, 65, 256)])
def test_reference_equals_its_definition(dtype, scheme, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype)
    q, scale = run_by("reference", "quantize_activation", x, scheme)
    expected_q, expected_scale = definition(x, scheme)
    assert_quantized_alike((expected_q.to(q.dtype), expected_scale.float()), (q, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(128,), (1, 256), (130, 128), (2, 65, 384)])
def test_triton_equals_the_reference(dtype, scheme, shape, device):
    x = torch.randn(shape, device=device, dtype=dtype)
    expected = run_by("reference", "quantize_activation", x, scheme)
    assert_quantized_alike(expected, run_by("triton", "quantize_activation", x, scheme))


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_input(provider, scheme, device):
    x = torch.randn(3, 50, 2, 256, device=device)[:, :, 1].transpose(0, 1)
    expected = run_by("reference", "quantize_activation", x.contiguous(), scheme)
    assert_quantized_alike(expected, run_by(provider, "quantize_activation", x, scheme))


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_blocks_outliers_and_tiny_values_round_trip(provider, scheme, device):
    x = torch.randn(256, 384, device=device)
    x[:128, :128] = 0
    x[128:, 128:256] *= 1e-20
    x[3, 300] = 3e37
    q, scale = run_by(provider, "quantize_activation", x, scheme)
    back = dequantize_activation(q, scale, scheme)
    assert back.isfinite().all() and (scale > 0).all()
    assert (back[:128, :128] == 0).all()
    assert back[3, 300].item() == pytest.approx(3e37, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 260),
    groups=st.integers(1, 3),
    magnitude=st.floats(-6, 30),
    scheme=st.sampled_from(sorted(SCHEMES)),
    seed=st.integers(0, 2**31),
)
def test_round_trip_errs_by_half_a_step_at_most(rows, groups, magnitude, scheme, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * 128, generator=generator) * 10.0**magnitude
    q, scale = quantize_activation(x, scheme)
    error = (dequantize_activation(q, scale, scheme) - x).abs()
    step_scale = scale.repeat_interleave(SCHEMES[scheme].activation_block[0], 0)[:rows]
    step_scale = step_scale.repeat_interleave(128, 1)
    if scheme == "int8-block":  # half a step; a whole one where +amax is limited to 127
        limited = x >= 127.5 * step_scale
        assert (error <= step_scale * torch.where(limited, 1.0, 0.5) * (1 + 1e-4)).all()
    else:  # half of 1/8 relative, or half of the subnormal step
        assert (error <= torch.maximum(x.abs() / 16, step_scale * 2.0**-10) * (1 + 1e-4)).all()


@settings(max_examples=15, deadline=None)
@given(
    scheme=st.sampled_from(sorted(SCHEMES)), power=st.integers(-10, 20), seed=st.integers(0, 999)
)
def test_scaling_by_a_power_of_two_scales_only_the_scale(scheme, power, seed):
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize_activation(x, scheme)
    scaled_q, scaled_scale = quantize_activation(x * 2.0**power, scheme)
    assert torch.equal(q.float(), scaled_q.float())
    assert torch.equal(scale * 2.0**power, scaled_scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(128, 128), (320, 384), (1100, 128), (7, 256)])
def test_weight_round_trip(scheme, shape, device):
    weight = torch.randn(shape, device=device, dtype=torch.bfloat16)
    q, scale = quantize_weight(weight, scheme)
    assert q.dtype is SCHEMES[scheme].dtype and q.shape == shape
    assert scale.shape == (-(-shape[0] // 128), shape[1] // 128) and scale.is_contiguous()
    assert sqnr_db(weight, dequantize_weight(q, scale)) > LEAST_SQNR_DB[scheme]
    assert dequantize_weight(q, scale, torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 128), (300, 384), (129, 1280), (130, 4224)])
def test_weights_are_quantized_bit_for_bit_as_defined(scheme, shape, dtype, device):
    weight = (torch.randn(shape, device=device) * 0.02).to(dtype)
    weight[0, :128] = 0
    rules = SCHEMES[scheme]
    expected_scale = reference.scale_of(weight.float(), rules, 128)
    expected_q = reference.to_quantized(weight.float(), expected_scale, rules, 128)
    q, scale = quantize_weight(weight, scheme)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8))


def test_a_quotient_rounded_past_the_largest_code_becomes_it():
    largest = torch.linspace(0.5, 2.0, 4096)
    weight = torch.zeros(4096, 128, 128)
    weight[:, 0, 0] = largest
    q, scale = quantize_weight(weight.reshape(-1, 128), "fp8-block")
    assert (largest / scale[:, 0] > 448).any()
    assert (q.reshape(4096, 128, 128)[:, 0, 0].float() == 448).all()


def test_every_e4m3_code_is_dequantized_exactly():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()]
    for q in (codes, finite[:128], finite[-128:]):
        values = dequantize_weight(q.view(-1, 128), torch.ones(1, 1))
        assert torch.equal(values.flatten().nan_to_num(nan=999), q.float().nan_to_num(nan=999))


def test_int8_weight_blocks_equal_activation_blocks():
    weight = torch.randn(1200, 256)
    q, scale = quantize_weight(weight, "int8-block")
    expected_q, expected_scale = quantize_activation(weight, "int8-block")
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


def test_int8_weight_agrees_with_torchao():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = torch.randn(256, 384)
    q, scale = quantize_weight(weight, "int8-block")
    theirs = (
        primitives._quantize_affine_no_dtype_cast(
            weight, [128, 128], scale, torch.zeros_like(scale), -128, 127
        )
        if hasattr(primitives, "_quantize_affine_no_dtype_cast")
        else primitives.quantize_affine(weight, [128, 128], scale, None, torch.int8, -128, 127)
    )
    assert (q.float() - theirs.float()).abs().max() <= 1
    assert (q.float() != theirs.float()).float().mean() < 1e-3


def test_a_large_weight_is_quantized_in_bounded_memory():
    """The peak above the inputs and outputs is a few bands, not copies of the weight."""
    weight = torch.randn(8192, 512).bfloat16()
    with torch.profiler.profile(profile_memory=True) as profile:
        quantize_weight(weight, "int8-block")
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest <= 8192 * 512 * 1.5  # one byte a value for q; no float32 copy (four bytes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck(scheme, device):
    assert_opcheck("quantize_activation", torch.randn(2, 5, 256, device=device), scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens(scheme, device):
    q, scale = quantize_activation(torch.randn(0, 256, device=device), scheme)
    assert q.shape == (0, 256) and scale.shape == (0, 2)


def test_columns_must_be_whole_blocks():
    with pytest.raises(OperatorInputError, match="multiple of 128, got 200"):
        quantize_activation(torch.randn(4, 200), "fp8-block")
    with pytest.raises(OperatorInputError, match="multiple of 128, got 200"):
        quantize_weight(torch.randn(4, 200), "int8-block")


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(OperatorInputError, match=r"'int8_block'.*did you mean 'int8-block'"):
        quantize_activation(torch.randn(4, 128), "int8_block")


@pytest.mark.parametrize("weight", [torch.randn(128), torch.ones(128, 128, dtype=torch.int8)])
def test_a_weight_must_be_a_floating_matrix(weight):
    with pytest.raises(OperatorInputError, match="floating"):
        quantize_weight(weight, "int8-block")


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "triton"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "shape", [(1, 128), (2, 65, 384), (32760, 1536), (75600, 5120), (32760, 8960)]
)
def test_bfloat16_on_the_gpu(provider, scheme, shape, device):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    expected = run_by("reference", "quantize_activation", x, scheme)
    assert_quantized_alike(expected, run_by(provider, "quantize_activation", x, scheme))
