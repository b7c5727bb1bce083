"""fuse-epilogues, linear_residual: a layer adds to the residual stream itself."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.tiny_folder import tiny_program
from tests.helpers.variants import VARIANTS, captured_program
from tests.passes.epilogues import (
    BASE,
    QUANTIZED,
    SCHEMES,
    dequantized,
    gated,
    layer_operands,
    ops,
    output_sqnr_db,
)
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.artifact.save import save
from turbo_opt.artifact.verify import verify
from turbo_opt.errors import BudgetExceeded

RESIDUALS = "fuse-epilogues{linear_residual=true}"
SCALED_HINTS = {"turbo_opt.gated_residual", "turbo_opt.residual_adaln_quantize"}


def into_stream(q, q_scale, x, gate, weight, weight_scale, bias, scheme="fp8-block"):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, scheme, x.dtype)
    return gated(x, y, gate)


def residual_problem(net=into_stream, scheme="fp8-block", dtype=torch.bfloat16):
    """A program of (q, q_scale, x, gate) and the weights of a layer from 128 to 256 features."""
    (q, q_scale), weights = layer_operands(scheme)
    x, gate = torch.randn(2, 50, 256).to(dtype), torch.randn(2, 1, 256)
    weights["bias"] = weights["bias"].to(dtype)
    return program_of(net, q, q_scale, x, gate, **weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_adds_to_the_stream_where_that_is_asked_for(optimize, scheme, dtype):
    def net(*operands, **weights):
        return into_stream(*operands, **weights, scheme=scheme)

    before = residual_problem(net, scheme, dtype)
    left = optimize(residual_problem(net, scheme, dtype), f"{BASE}fuse-epilogues")
    assert ops_of(left) == ["turbo_opt.block_linear", "turbo_opt.gated_residual"]
    after = optimize(before, f"{BASE}{RESIDUALS}")
    assert ops_of(after) == ["turbo_opt.linear_gated_residual"]
    (fused,) = calls_of(after, "turbo_opt.linear_gated_residual")
    names = ["q", "q_scale", "weight", "weight_scale", "bias", "x", "gate"]
    expected = [argument.name for argument in fused.target._schema.arguments]
    assert expected == [*names, "scheme"] and fused.args[-1] == scheme
    layer, total = calls_of(left, "turbo_opt.block_linear") + calls_of(
        left, "turbo_opt.gated_residual"
    )
    operands = [*layer.args[:5], total.args[0], total.args[2]]
    assert [node.name for node in fused.args[:7]] == [node.name for node in operands]
    assert after.history[-1]["verification"]["checked"] == 2  # the sum, then the layer in it


@pytest.mark.parametrize(
    "add", [lambda x, y: x + y, lambda x, y: y + x], ids=["after", "before the stream"]
)
def test_a_layer_is_added_without_a_gate_and_its_norm_reads_the_stream(optimize, add):
    def net(q, q_scale, x, gate, weight, weight_scale, bias):
        y = ops.block_linear(q, q_scale, weight, weight_scale, bias, "fp8-block", x.dtype)
        stream = add(x, y)
        pair = ops.adaln_quantize(stream, gate * 2, gate, 1e-6, "fp8-block")
        return dequantized(pair) + stream

    after = optimize(residual_problem(net), f"{BASE}{RESIDUALS}")
    names = ops_of(after)
    assert names.count("turbo_opt.linear_gated_residual") == 1
    assert names.count("turbo_opt.adaln_quantize") == 1
    gone = {"turbo_opt.block_linear", "turbo_opt.gated_residual"}
    assert not (gone | {"turbo_opt.residual_adaln_quantize"}) & set(names)
    (fused,) = calls_of(after, "turbo_opt.linear_gated_residual")
    assert fused.args[5].op == "placeholder" and fused.args[6] is None
    assert reasons_of(after) == []


def read_twice(*operands, **weights):
    q, q_scale, x, gate = operands
    y = ops.block_linear(q, q_scale, *weights.values(), "fp8-block", x.dtype)
    return gated(x, y, gate) + y


def added_to_itself(q, q_scale, x, gate, weight, weight_scale, bias):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, "fp8-block", x.dtype)
    return torch.layer_norm(y + y, (256,), x[0, 0], x[0, 1], 1e-6)


def after_an_activation(q, q_scale, x, gate, weight, weight_scale, bias):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, "fp8-block", x.dtype)
    return gated(x, y.relu(), gate)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (read_twice, "the layer's 16-bit result has another use too"),
        (added_to_itself, "the layer's 16-bit result has another use too"),
        (
            after_an_activation,
            "what is added to the stream is not the result of a quantized layer",
        ),
    ],
)
def test_a_near_miss_of_a_layer_and_its_sum_says_why(optimize, net, reason):
    after = optimize(residual_problem(net), f"{BASE}{RESIDUALS}")
    assert reasons_of(after) == [reason]
    names = ops_of(after)
    assert {"turbo_opt.block_linear", "turbo_opt.gated_residual"} <= set(names)


def test_a_layer_of_another_dtype_than_the_stream_is_a_near_miss(optimize):
    def net(q, q_scale, x, gate, weight, weight_scale, bias):
        layer = weight, weight_scale, bias.float(), "fp8-block", torch.float32
        y = ops.block_linear(q, q_scale, *layer)
        return torch.layer_norm(x + y.half(), (256,), bias.float(), bias.float(), 1e-6).half()

    program = residual_problem(net, dtype=torch.float32)
    after = optimize(program, f"{BASE}fuse-epilogues?{{linear_residual=true}}")
    assert "turbo_opt.linear_gated_residual" not in ops_of(after)
    assert reasons_of(after) == ["the branch is torch.float16 while x is torch.float32"]


@pytest.mark.parametrize("position", [4, 6], ids=["bias", "gate"])
def test_a_sum_that_loses_an_operand_exceeds_the_budget(optimize, monkeypatch, position):
    from turbo_opt.passes._epilogues import linear_residual as module

    honest = module.emit_linear_residual

    def without(found, editor):
        new = honest(found, editor)
        new.args = (*new.args[:position], None, *new.args[position + 1 :])
        return new

    monkeypatch.setattr(module, "emit_linear_residual", without)
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(residual_problem(), f"{BASE}{RESIDUALS}")


@pytest.mark.parametrize(
    ("name", "dtype", "sums", "left", "least"),
    [
        ("t2v", torch.float32, 6, set(), float("inf")),
        ("t2v", torch.bfloat16, 6, set(), 35),
        # the control stream begins with such a sum; what it gives is scaled before it is added
        ("vace", torch.bfloat16, 13, SCALED_HINTS, 35),
    ],
    ids=["t2v in float32", "t2v in bfloat16", "vace"],
)
def test_every_layer_that_ends_a_branch_adds_to_the_stream_on_request(
    optimize, name, dtype, sums, left, least
):
    text = QUANTIZED.format("fp8-block")
    before = optimize(captured_program(VARIANTS[name], dtype), f"{text},fuse-epilogues", "off")
    after = optimize(captured_program(VARIANTS[name], dtype), f"{text},{RESIDUALS}", "off")
    assert ops_of(after).count("turbo_opt.linear_gated_residual") == sums
    others = {op for op in ops_of(after) if "residual" in op and "linear" not in op}
    assert others == left
    assert output_sqnr_db(before, after, VARIANTS[name], dtype) >= least


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_artifact_whose_layers_add_to_the_stream_replays_bit_for_bit(optimize, scheme, tmp_path):
    after = optimize(tiny_program(), f"{QUANTIZED.format(scheme)},{RESIDUALS}", "off")
    assert ops_of(after).count("turbo_opt.linear_gated_residual") == 3
    (replay,) = verify(save(after, tmp_path / "artifact")).replays
    assert replay.bitwise
