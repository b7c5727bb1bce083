"""Sums, quantized layers and divisions, each against the plain formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from turbo_opt.calibration.scales.balance import LARGEST, exponents, gain
from turbo_opt.calibration.scales.quantized import Form, LayerErrors, forms_of
from turbo_opt.calibration.scales.statistics import EffectSums, ErrorSums, InputSums, decibels
from turbo_opt.kernels import block_linear, quantize_activation, quantize_weight

CPU = torch.device("cpu")


def layer(out=128, into=256, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(into, out).requires_grad_(False)


def test_statistics_of_several_evaluations_are_those_of_all_values():
    torch.manual_seed(0)
    parts = [torch.randn(1, 40, 8), torch.randn(1, 40, 8) * 3]
    parts[0][0, 0, 2] = 50.0
    sums = InputSums(2, 8, CPU)
    for x in parts:
        sums.add(1, x)
    sums.add(0, parts[0])
    found, values = sums.statistics(), torch.cat(parts).double()
    assert found.amax == (50.0, 50.0)
    assert found.rms[1] == pytest.approx(values.square().mean().sqrt().item(), rel=1e-4)
    kurtosis = values.pow(4).mean() / values.square().mean().square()
    assert found.kurtosis[1] == pytest.approx(kurtosis.item(), rel=1e-4)
    assert found.outliers == pytest.approx((1 / 320, 1 / 640), rel=1e-4)
    assert torch.equal(sums.channel_amax, torch.cat(parts).abs().amax((0, 1)))


def test_an_input_of_zeros_has_finite_statistics():
    sums = InputSums(1, 4, CPU)
    sums.add(0, torch.zeros(1, 3, 4))
    assert sums.statistics().kurtosis == (0.0,)


def test_errors_are_told_as_parts_and_in_decibels():
    sums = ErrorSums(2, CPU)
    sums.add(0, torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.0]))
    sums.add(1, torch.tensor([1.0]), torch.tensor([0.0]))
    assert sums.relative() == (0.1, 0.0)
    assert sums.sqnr() == (20.0, 300.0)
    assert decibels(1.0, 0.0) == -300.0


def test_probes_estimate_the_norm_of_what_they_are_multiplied_with():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, generator=generator) * torch.linspace(0, 1, 50)
    effect, signal = EffectSums(CPU), EffectSums(CPU)
    for _ in range(2000):
        effect.add(torch.randn(50, generator=generator) @ noise)
        signal.add(torch.tensor(10.0))
    assert effect.relative(signal) == pytest.approx(noise.norm().item() / 10, rel=0.05)


@pytest.mark.parametrize("scheme", ["int8-block", "fp8-block"])
def test_the_error_is_that_of_the_compiled_product(scheme):
    linear, x = layer(), torch.randn(2, 100, 256)
    form = Form("layer", scheme, False)
    ((rows, expected, added),) = LayerErrors(linear.weight, linear.bias, None).of(x, [form])
    assert (rows.start, rows.stop) == (0, 200)
    operands = (*quantize_activation(x, scheme), *quantize_weight(linear.weight, scheme))
    found = block_linear(*operands, linear.bias, scheme, torch.float32).flatten(0, 1)
    torch.testing.assert_close(expected + added[form], found, rtol=1e-5, atol=1e-5)


def test_bands_give_what_one_piece_gives(monkeypatch):
    from turbo_opt.calibration.scales import quantized

    linear, x = layer(), torch.randn(1, 300, 256)
    errors, forms = LayerErrors(linear.weight, None, None), [Form("layer", "int8-block", False)]
    ((_, _, whole),) = errors.of(x, forms)
    monkeypatch.setattr(quantized, "BAND", 128)
    bands = [added[forms[0]] for _, _, added in errors.of(x, forms)]
    assert [len(band) for band in bands] == [128, 128, 44]
    torch.testing.assert_close(torch.cat(bands), whole[forms[0]], rtol=1e-5, atol=1e-6)


def test_layers_that_blocks_do_not_fit_have_no_forms():
    assert forms_of("odd", layer(into=200), {}) == []
    divided = forms_of("even", layer(), {"even": torch.ones(256)})
    assert [form.divided for form in divided] == [False, True, False, True]


def test_dividing_an_outlier_channel_helps_int8_and_hardly_fp8():
    linear, x = layer(), torch.randn(1, 256, 256)
    x[..., 5] *= 200
    channels, weights = x.abs().amax((0, 1)), linear.weight.abs().amax(0)
    exponent = exponents(channels, weights, 0.5)
    errors = LayerErrors(linear.weight, linear.bias, torch.exp2(exponent.float()))
    forms = forms_of("layer", linear, {"layer": errors.divisor})
    ((_, _, added),) = errors.of(x, forms)
    noise = {form[1:]: error.square().sum().item() for form, error in added.items()}
    assert noise["int8-block", True] < noise["int8-block", False] / 3
    assert noise["fp8-block", True] == pytest.approx(noise["fp8-block", False], rel=0.3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=12), st.floats(0, 1))
def test_exponents_are_small_whole_numbers_whatever_the_channels(amax, alpha):
    channels = torch.tensor(amax)
    found = exponents(channels, torch.ones(len(amax)), alpha)
    assert found.dtype == torch.int32
    assert int(found.abs().max()) <= LARGEST


def test_even_channels_are_not_divided():
    assert not exponents(torch.full((8,), 3.0), torch.full((8,), 0.1), 0.5).any()


def test_gain_is_that_of_the_noise_of_all_layers_together():
    before = {"q": [20.0], "k": [40.0]}
    assert gain(before, {"q": [23.0], "k": [37.0]}) == pytest.approx(2.874, abs=0.001)
    assert gain(before, before) == 0.0
