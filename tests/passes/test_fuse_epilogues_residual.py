"""fuse-epilogues, the residual stream: gated sums, and the norms that read them."""

from __future__ import annotations

import pytest
import torch

from tests.passes.epilogues import BASE, GATE, SCALE, SCHEMES, SHIFT, X, Y, dequantized, gated, ops
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.errors import BudgetExceeded

W, B = torch.randn(128), torch.randn(128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "net",
    [
        gated,
        lambda x, y, gate: (x.float() + y.float() * gate).type_as(x),
        lambda x, y, gate: (gate * y.float() + x.float()).type_as(x),
    ],
    ids=["branch in 16 bits", "branch in float32", "the other way round"],
)
def test_a_gated_branch_is_added_in_one_step(optimize, dtype, net):
    after = optimize(program_of(net, X.to(dtype), Y.to(dtype), GATE), f"{BASE}fuse-epilogues")
    assert ops_of(after) == ["turbo_opt.gated_residual"]
    (call,) = calls_of(after, "turbo_opt.gated_residual")
    inputs = [node for node in call.graph.nodes if node.op == "placeholder"]
    assert list(call.args) == inputs
    assert after.history[-1]["verification"]["bitwise"]


def test_a_gate_for_every_token_is_told_from_the_branch_by_its_dtype(optimize):
    gate = torch.randn(2, 150, 128)
    after = optimize(program_of(gated, X.bfloat16(), Y.bfloat16(), gate), f"{BASE}fuse-epilogues")
    (call,) = calls_of(after, "turbo_opt.gated_residual")
    assert [node.meta["val"].dtype for node in call.args][1:] == [torch.bfloat16, torch.float32]


def test_a_plain_sum_is_fused_where_a_norm_reads_it(optimize):
    def stream(x, y, w, b):
        return torch.layer_norm(x + y, (128,), w, b, 1e-6)

    after = optimize(program_of(stream, X, Y, w=W, b=B), f"{BASE}fuse-epilogues")
    assert ops_of(after) == ["turbo_opt.gated_residual", "turbo_opt.layer_norm"]
    after = optimize(program_of(lambda x, y: x + y, X, Y), f"{BASE}fuse-epilogues?")
    assert ops_of(after) == ["aten.add.Tensor"]


def test_a_sum_that_stays_in_float32_is_a_near_miss(optimize):
    def net(x, y, gate):
        return x.float() + y * gate

    program = program_of(net, X.bfloat16(), Y.bfloat16(), GATE)
    after = optimize(program, f"{BASE}fuse-epilogues?")
    assert reasons_of(after) == ["the sum is read in torch.float32 while x is torch.bfloat16"]


def test_a_branch_of_another_dtype_is_a_near_miss(optimize):
    def net(x, y, w, b):
        return torch.layer_norm(x + y.float(), (128,), w, b, 1e-6)

    after = optimize(program_of(net, X, Y.bfloat16(), w=W, b=B), f"{BASE}fuse-epilogues?")
    assert reasons_of(after) == ["the branch is torch.bfloat16 while x is torch.float32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm", ["adaln", "layer_norm"])
def test_the_norm_of_the_stream_is_quantized_as_the_branch_is_added(optimize, dtype, scheme, norm):
    def net(x, y, gate, scale, shift, w, b):
        stream = gated(x, y, gate)
        if norm == "adaln":
            pair = ops.adaln_quantize(stream, scale * 2, shift, 1e-6, scheme)
        else:
            pair = ops.layer_norm_quantize(stream, w, b, 1e-6, scheme)
        return dequantized(pair) + stream

    inputs = (X.to(dtype), Y.to(dtype), GATE, SCALE, SHIFT)
    after = optimize(program_of(net, *inputs, w=W, b=B), f"{BASE}fuse-epilogues")
    fused = f"turbo_opt.residual_{norm}_quantize"
    assert ops_of(after).count(fused) == 1
    others = {"turbo_opt.gated_residual", f"turbo_opt.{norm}_quantize"}
    assert not others & set(ops_of(after))
    (call,) = calls_of(after, fused)
    assert sorted(item.args[1] for item in call.users) == [0, 1, 2]
    assert after.history[-1]["verification"]["bitwise"]


def test_what_reads_the_stream_before_the_norm_moves_behind_it(optimize):
    def net(x, y, gate, scale, shift):
        stream = gated(x, y, gate)
        early = (stream * 2).exp()
        pair = ops.adaln_quantize(stream, scale + 1, shift, 1e-6, "fp8-block")
        return dequantized(pair) + early

    program = program_of(net, X, Y, GATE, SCALE, SHIFT)
    after = optimize(program, f"{BASE}fuse-epilogues")
    names = ops_of(after)
    assert names.index("turbo_opt.residual_adaln_quantize") < names.index("aten.exp")
    inputs = (X, Y, GATE, SCALE, SHIFT)
    (before_net,), (after_net,) = program, after
    expected = before_net.graph_module(*inputs)[0]
    assert torch.equal(after_net.graph_module(*inputs)[0], expected)


def test_a_norm_whose_modulation_follows_from_the_stream_is_a_near_miss(optimize):
    def net(x, y, gate, shift):
        stream = gated(x, y, gate)
        scale = stream.mean(1, keepdim=True)
        return dequantized(ops.adaln_quantize(stream, scale, shift, 1e-6, "fp8-block"))

    after = optimize(program_of(net, X, Y, GATE, SHIFT), f"{BASE}fuse-epilogues")
    assert reasons_of(after) == ["scale and shift of the norm depend on the stream"]
    assert "turbo_opt.gated_residual" in ops_of(after)


def test_two_norms_may_read_one_stream(optimize):
    def net(x, y, gate, scale, shift):
        stream = gated(x, y, gate)
        first = ops.adaln_quantize(stream, scale, shift, 1e-6, "fp8-block")
        second = ops.adaln_quantize(stream, shift, scale, 1e-6, "fp8-block")
        return dequantized(first) + dequantized(second)

    program = program_of(net, X, Y, GATE, SCALE, SHIFT)
    after = optimize(program, f"{BASE}fuse-epilogues")
    assert ops_of(after).count("turbo_opt.residual_adaln_quantize") == 1
    assert ops_of(after).count("turbo_opt.adaln_quantize") == 1
    assert reasons_of(after) == ["what the norm reads is not a sum that this pass has fused"]


def test_a_wrong_gate_exceeds_the_budget(optimize, monkeypatch):
    from turbo_opt.passes._epilogues import residual as module

    def ungated(found, editor):
        return editor.call(ops.gated_residual.default, *found.inputs[:2], None)

    monkeypatch.setattr(module, "emit_residual", ungated)
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(program_of(gated, X, Y, GATE), f"{BASE}fuse-epilogues")
