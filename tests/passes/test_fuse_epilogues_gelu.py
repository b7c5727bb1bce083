"""fuse-epilogues, gelu: its quantization, and the layer before it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from tests.helpers.variants import VARIANTS, captured_program
from tests.passes.epilogues import (
    BASE,
    QUANTIZED,
    SCHEMES,
    X,
    dequantized,
    layer_operands,
    ops,
    output_sqnr_db,
)
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.errors import BudgetExceeded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gelu_writes_the_quantized_activation(optimize, dtype, scheme):
    def net(x):
        return dequantized(ops.quantize_activation(gelu(x, approximate="tanh"), scheme))

    after = optimize(program_of(net, X.to(dtype)), f"{BASE}fuse-epilogues")
    assert ops_of(after)[0] == "turbo_opt.gelu_quantize"
    assert not {"aten.gelu", "turbo_opt.quantize_activation"} & set(ops_of(after))
    assert after.history[-1]["verification"]["checked"] == 1


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda x: dequantized(ops.quantize_activation(gelu(x), "fp8-block")),
            "the gelu is not the tanh form",
        ),
        (
            lambda x: (
                dequantized(ops.quantize_activation(gelu(x, approximate="tanh"), "fp8-block"))
                + gelu(x, approximate="tanh")
            ),
            "the gelu's 16-bit result is read by a layer that is not quantized",
        ),
    ],
)
def test_a_near_miss_of_gelu_says_why(optimize, net, reason):
    after = optimize(program_of(net, X), f"{BASE}fuse-epilogues?")
    assert reasons_of(after) == [reason]
    assert "turbo_opt.gelu_quantize" not in ops_of(after)


FUSED = f"{BASE}fuse-epilogues{{linear_gelu=true}}"


def layer_then_gelu(scheme):
    """A program of a layer from 128 to 256 features, and its quantized gelu."""

    def net(q, q_scale, weight, weight_scale, bias):
        y = ops.block_linear(q, q_scale, weight, weight_scale, bias, scheme, torch.bfloat16)
        return dequantized(ops.gelu_quantize(y, scheme))

    activation, weights = layer_operands(scheme)
    return program_of(net, *activation, **weights)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_writes_its_quantized_gelu_where_that_is_asked_for(optimize, scheme):
    left = optimize(layer_then_gelu(scheme), f"{BASE}fuse-epilogues?")
    assert ops_of(left)[:2] == ["turbo_opt.block_linear", "turbo_opt.gelu_quantize"]
    after = optimize(layer_then_gelu(scheme), FUSED)
    assert ops_of(after) == ["turbo_opt.linear_gelu_quantize", *ops_of(left)[2:]]
    (layer,) = calls_of(left, "turbo_opt.block_linear")
    (fused,) = calls_of(after, "turbo_opt.linear_gelu_quantize")
    assert [str(operand) for operand in fused.args] == [str(operand) for operand in layer.args]
    verification = after.history[-1]["verification"]
    assert (verification["checked"], verification["bitwise"]) == (1, True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_that_loses_its_bias_exceeds_the_budget(optimize, monkeypatch, scheme):
    from turbo_opt.passes._epilogues import gelu as module

    def compare(found, new, editor):
        ((before, after),) = whole(found, new, editor)
        return [(before, editor.call(after.target, *after.args[:4], None, *after.args[5:]))]

    whole = module.layer_in_float32
    monkeypatch.setattr(module, "layer_in_float32", compare)
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(layer_then_gelu(scheme), FUSED)


def mixed_layer(q, q_scale, weight, weight_scale, bias):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, "int8-block", torch.bfloat16)
    return dequantized(ops.gelu_quantize(y, "fp8-block"))


def layer_read_twice(q, q_scale, weight, weight_scale, bias):
    scheme = "int8-block" if q.dtype is torch.int8 else "fp8-block"
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, scheme, torch.bfloat16)
    return dequantized(ops.gelu_quantize(y, scheme)) + y


READ_TWICE = "the layer's 16-bit result is read by another operator too"


@pytest.mark.parametrize(
    ("net", "scheme", "reason"),
    [
        (mixed_layer, "int8-block", "the layer is int8-block and its result fp8-block"),
        (layer_read_twice, "int8-block", READ_TWICE),
        (layer_read_twice, "fp8-block", READ_TWICE),
    ],
)
def test_a_near_miss_of_a_layer_and_its_gelu_says_why(optimize, net, scheme, reason):
    activation, weights = layer_operands(scheme)
    program = program_of(net, *activation, **weights)
    after = optimize(program, f"{BASE}fuse-epilogues?{{linear_gelu=true}}")
    assert reasons_of(after) == [reason]
    assert "turbo_opt.linear_gelu_quantize" not in ops_of(after)


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, float("inf")), (torch.bfloat16, 35)], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_before_a_gelu_of_a_model_is_fused_on_request(optimize, scheme, dtype, least):
    text = f"{QUANTIZED.format(scheme)},fuse-epilogues"
    before = optimize(captured_program(VARIANTS["t2v"], dtype), text, "off")
    after = optimize(captured_program(VARIANTS["t2v"], dtype), f"{text}{{linear_gelu=true}}")
    assert ops_of(after).count("turbo_opt.linear_gelu_quantize") == 2
    assert "turbo_opt.gelu_quantize" not in ops_of(after)
    assert output_sqnr_db(before, after, VARIANTS["t2v"], dtype) >= least
