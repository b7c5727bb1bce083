"""fuse-epilogues, attention: what its projection reads is written quantized."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import VARIANTS, captured_program
from tests.passes.epilogues import BASE, SPARSE_QUANTIZED, dequantized, ops, output_sqnr_db
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.errors import BudgetExceeded

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
    from turbo_opt.passes._epilogues import attention as module

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
    assert output_sqnr_db(before, after, variant, dtype) >= least


def test_later_passes_know_attention_that_writes_its_quantized_result(optimize):
    text = f"{SPARSE_QUANTIZED},fuse-epilogues,fuse-qkv{{cross_attention=false}},sage-attention?"
    after = optimize(captured_program(VARIANTS["t2v"]), text, "off")
    assert after.history[-2]["matches"] == 2
    assert "it is sparse already, and keeps its own formats" in reasons_of(after)
