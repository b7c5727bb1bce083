"""fuse-epilogues: graphs before and after, near misses, other readers of the stream, parity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from tests.helpers.variants import VARIANTS, captured_program, compiled, random_inputs
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput, BudgetExceeded
from turbo_opt.kernels import quantize_activation, quantize_weight

BASE = "canonicalize,fuse-norms?,"
QUANTIZED = "canonicalize,fuse-norms,quantize-linear{{scheme={}}},fuse-norm-quantize"
SPARSE_QUANTIZED = (
    "canonicalize,fuse-norms,sparse-attention{proj_l=zero topk=0.5 pv=fp8},fuse-qk-norm-rope,"
    "quantize-linear{scheme=fp8-block},fuse-norm-quantize"
)
SCHEMES = ["int8-block", "fp8-block"]
X, Y = torch.randn(2, 150, 128), torch.randn(2, 150, 128)
GATE, SCALE, SHIFT = (torch.randn(2, 1, 128) for _ in range(3))
W, B = torch.randn(128), torch.randn(128)
ops = torch.ops.turbo_opt


def dequantized(pair):
    return pair[0].float() * pair[1].sum()


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


QKV = torch.randn(2, 70, 3 * 256)
ANGLES = torch.randn(1, 70, 1, 64)
TABLES = ANGLES.cos(), ANGLES.sin()


def attended(qkv, cos, sin, wq, wk):
    settings = (None, None, 0.5, 64, 128, "softmax", "fp8")
    return ops.norm_rope_sagesla(*qkv.split(256, -1), wq, wk, cos, sin, 1e-6, *settings)


def attention_program(net, dtype=torch.float32):
    weights = {"wq": 1 + torch.randn(256) / 4, "wk": 1 + torch.randn(256) / 4}
    weights = {name: value.to(dtype) for name, value in weights.items()}
    return program_of(net, QKV.to(dtype), *TABLES, **weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_writes_the_quantized_activation(optimize, dtype):
    def net(*operands, **weights):
        return dequantized(ops.quantize_activation(attended(*operands, **weights), "fp8-block"))

    before = attention_program(net, dtype)
    (call,) = calls_of(before, "turbo_opt.norm_rope_sagesla")
    arguments = [getattr(argument, "name", argument) for argument in call.args]
    after = optimize(before, f"{BASE}fuse-epilogues")
    names = ops_of(after)
    assert names[:2] == ["aten.split.Tensor", "turbo_opt.norm_rope_sagesla_quantize"]
    assert not {"turbo_opt.norm_rope_sagesla", "turbo_opt.quantize_activation"} & set(names)
    (fused,) = calls_of(after, "turbo_opt.norm_rope_sagesla_quantize")
    found = [getattr(argument, "name", argument) for argument in fused.args]
    assert found == [*arguments, "fp8-block"]
    assert after.history[-1]["verification"]["checked"] == 1


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda *operands, **weights: dequantized(
                ops.quantize_activation(attended(*operands, **weights), "int8-block")
            ),
            "a scale of int8-block spans more tokens than attention holds at once",
        ),
        (
            lambda *operands, **weights: (
                dequantized(ops.quantize_activation(attended(*operands, **weights), "fp8-block"))
                + attended(*operands, **weights)
            ),
            "the attention's 16-bit result is read by a layer that is not quantized",
        ),
    ],
    ids=["blocks of tokens", "another reader"],
)
def test_a_near_miss_of_attention_says_why(optimize, net, reason):
    after = optimize(attention_program(net), f"{BASE}fuse-epilogues?")
    assert reasons_of(after) == [reason]
    assert "turbo_opt.norm_rope_sagesla_quantize" not in ops_of(after)


@pytest.mark.parametrize("wrong", [slice(0, 2), slice(3, 5)], ids=["q and k", "their weights"])
def test_swapped_operands_of_attention_exceed_the_budget(optimize, monkeypatch, wrong):
    from turbo_opt.passes import fuse_epilogues as module

    honest = module.emit_attention

    def swapped(found, editor):
        new = honest(found, editor)
        args = list(new.args)
        args[wrong] = args[wrong][::-1]
        new.args = tuple(args)
        return new

    def net(*operands, **weights):
        return dequantized(ops.quantize_activation(attended(*operands, **weights), "fp8-block"))

    monkeypatch.setattr(module, "emit_attention", swapped)
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(attention_program(net), f"{BASE}fuse-epilogues")


def layer_then_gelu(q, q_scale, weight, weight_scale, bias, scheme="fp8-block"):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, scheme, torch.bfloat16)
    return dequantized(ops.gelu_quantize(y, scheme))


def layer_operands(scheme="fp8-block"):
    """q and its scale, then the weight, its scale and a bias by name."""
    names = ("weight", "weight_scale", "bias")
    weights = (*quantize_weight(torch.randn(256, 128), scheme), torch.randn(256).bfloat16())
    activation = quantize_activation(torch.randn(2, 50, 128), scheme)
    return activation, dict(zip(names, weights, strict=True))


def test_a_layer_writes_its_quantized_gelu_where_that_is_asked_for(optimize):
    activation, weights = layer_operands()
    program = program_of(layer_then_gelu, *activation, **weights)
    left = optimize(program, f"{BASE}fuse-epilogues?")
    assert {"turbo_opt.block_linear", "turbo_opt.gelu_quantize"} <= set(ops_of(left))
    program = program_of(layer_then_gelu, *activation, **weights)
    after = optimize(program, f"{BASE}fuse-epilogues{{linear_gelu=true}}")
    assert ops_of(after)[0] == "turbo_opt.linear_gelu_quantize"
    assert not {"turbo_opt.block_linear", "turbo_opt.gelu_quantize"} & set(ops_of(after))
    assert after.history[-1]["verification"]["checked"] == 1


def test_a_layer_that_loses_its_bias_exceeds_the_budget(optimize, monkeypatch):
    from turbo_opt.passes import fuse_epilogues as module

    def compare(found, new, editor):
        ((before, after),) = whole(found, new, editor)
        return [(before, editor.call(after.target, *after.args[:4], None, *after.args[5:]))]

    whole = module.layer_in_float32
    monkeypatch.setattr(module, "layer_in_float32", compare)
    activation, weights = layer_operands()
    program = program_of(layer_then_gelu, *activation, **weights)
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(program, f"{BASE}fuse-epilogues{{linear_gelu=true}}")


def int8_layer(q, q_scale, weight, weight_scale, bias):
    return layer_then_gelu(q, q_scale, weight, weight_scale, bias, "int8-block")


def mixed_layer(q, q_scale, weight, weight_scale, bias):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, "int8-block", torch.bfloat16)
    return dequantized(ops.gelu_quantize(y, "fp8-block"))


def layer_read_twice(q, q_scale, weight, weight_scale, bias):
    y = ops.block_linear(q, q_scale, weight, weight_scale, bias, "fp8-block", torch.bfloat16)
    return dequantized(ops.gelu_quantize(y, "fp8-block")) + y


@pytest.mark.parametrize(
    ("net", "scheme", "reason"),
    [
        (
            int8_layer,
            "int8-block",
            "a scale of int8-block spans more tokens than a warp of the product holds",
        ),
        (mixed_layer, "int8-block", "the layer is int8-block and its result fp8-block"),
        (
            layer_read_twice,
            "fp8-block",
            "the layer's 16-bit result is read by another operator too",
        ),
    ],
)
def test_a_near_miss_of_a_layer_and_its_gelu_says_why(optimize, net, scheme, reason):
    activation, weights = layer_operands(scheme)
    program = program_of(net, *activation, **weights)
    after = optimize(program, f"{BASE}fuse-epilogues?{{linear_gelu=true}}")
    assert reasons_of(after) == [reason]
    assert "turbo_opt.linear_gelu_quantize" not in ops_of(after)


def gated(x, y, gate):
    return (x.float() + y * gate).type_as(x)


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


@pytest.mark.parametrize(
    ("option", "left"),
    [
        ("gelu", {"aten.gelu"}),
        ("attention", {"turbo_opt.norm_rope_sagesla"}),
        ("residual_norm", {"turbo_opt.gated_residual", "turbo_opt.adaln_quantize"}),
        ("residual", {"turbo_opt.adaln_quantize"}),
    ],
)
def test_options_leave_kinds_of_epilogues_alone(optimize, option, left):
    text = f"{SPARSE_QUANTIZED},fuse-epilogues{{{option}=false}}"
    after = optimize(captured_program(VARIANTS["t2v"]), text)
    assert left <= set(ops_of(after))


def test_norms_must_be_fused_before(optimize):
    with pytest.raises(BadInput, match="add 'fuse-norms' before 'fuse-epilogues'"):
        optimize(program_of(gated, X, Y, GATE), "canonicalize,fuse-epilogues")


def test_a_wrong_gate_exceeds_the_budget(optimize, monkeypatch):
    from turbo_opt.passes import fuse_epilogues as module

    def ungated(found, editor):
        return editor.call(ops.gated_residual.default, *found.inputs[:2], None)

    monkeypatch.setattr(module, "emit_residual", ungated)
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(program_of(gated, X, Y, GATE), f"{BASE}fuse-epilogues")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 110), (torch.bfloat16, 35)], ids=["float32", "bfloat16"]
)
def test_every_epilogue_of_every_variant_is_fused(optimize, name, scheme, dtype, least):
    variant = VARIANTS[name]
    text = QUANTIZED.format(scheme)
    before = optimize(captured_program(variant, dtype), text, "off")
    after = optimize(captured_program(variant, dtype), f"{text},fuse-epilogues")
    layers = 4 if name == "vace" else 2
    names = ops_of(after)
    assert names.count("turbo_opt.gelu_quantize") == layers
    assert names.count("turbo_opt.residual_layer_norm_quantize") == layers
    assert "turbo_opt.layer_norm_quantize" not in names
    # the first norm of a stack reads the embedding; the last sum is read by the final, 16-bit norm
    assert names.count("turbo_opt.adaln_quantize") == 1
    inputs = random_inputs(variant, 1, 2, 8, 8, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= least


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, float("inf")), (torch.bfloat16, 35)], ids=str
)
def test_every_layer_before_a_gelu_of_a_model_is_fused_on_request(optimize, dtype, least):
    text = f"{QUANTIZED.format('fp8-block')},fuse-epilogues"
    before = optimize(captured_program(VARIANTS["t2v"], dtype), text, "off")
    after = optimize(captured_program(VARIANTS["t2v"], dtype), f"{text}{{linear_gelu=true}}")
    assert ops_of(after).count("turbo_opt.linear_gelu_quantize") == 2
    assert "turbo_opt.gelu_quantize" not in ops_of(after)
    inputs = random_inputs(VARIANTS["t2v"], 1, 2, 8, 8, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= least


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("t2v", torch.float32, float("inf")),  # nothing is rounded in between: the same bits
        ("t2v", torch.bfloat16, 35),
        ("vace", torch.bfloat16, 35),
    ],
    ids=str,
)
def test_every_sparse_attention_writes_what_its_projection_reads(optimize, name, dtype, least):
    variant = VARIANTS[name]
    before = optimize(captured_program(variant, dtype), SPARSE_QUANTIZED, "off")
    only = "fuse-epilogues{gelu=false residual=false residual_norm=false}"
    after = optimize(captured_program(variant, dtype), f"{SPARSE_QUANTIZED},{only}", "off")
    calls = calls_of(after, "turbo_opt.norm_rope_sagesla_quantize")
    assert len(calls) == (4 if name == "vace" else 2)
    assert "turbo_opt.norm_rope_sagesla" not in ops_of(after)
    readers = {reader for call in calls for item in call.users for reader in item.users}
    assert {str(reader.target) for reader in readers} == {"turbo_opt.block_linear.default"}
    inputs = random_inputs(variant, 1, 2, 8, 8, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= least


def test_later_passes_know_attention_that_writes_its_quantized_result(optimize):
    text = f"{SPARSE_QUANTIZED},fuse-epilogues,fuse-qkv{{cross_attention=false}},sage-attention?"
    after = optimize(captured_program(VARIANTS["t2v"]), text, "off")
    assert after.history[-2]["matches"] == 2
    assert "it is sparse already, and keeps its own formats" in reasons_of(after)
