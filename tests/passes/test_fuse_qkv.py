"""fuse-qkv: graphs before and after, near misses, weights, parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.helpers.variants import (
    IN_EVERY_DTYPE,
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
)
from tests.passes.graphs import calls_of, ops_of, program_of_module, reasons_of
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.ir.transforms import block_quantized, concatenated
from turbo_opt.ir.weights import WeightStore, constant, from_json, to_json
from turbo_opt.kernels import quantize_weight
from turbo_opt.passes.fuse_qkv import merged_name

T2V = VARIANTS["t2v"]
X = torch.randn(2, 6, 128)


class Attention(nn.Module):
    def __init__(self, sizes=(128, 128, 128), bias=(True, True, True)):
        super().__init__()
        for name, size, biased in zip("qkv", sizes, bias, strict=True):
            layer = nn.Linear(128, size, bias=biased)
            self.add_module(f"to_{name}", layer.requires_grad_(False))

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attn1 = attention

    def forward(self, x):
        return self.attn1(x)


class Network(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.blocks = nn.ModuleList([Block(attention)])

    def forward(self, x):
        return self.blocks[0](x)


def fused(optimize, attention, text="canonicalize,fuse-qkv"):
    return optimize(program_of_module(Network(attention), X), text)


@pytest.mark.parametrize("biased", [True, False])
def test_layers_that_read_one_input_become_one(optimize, biased):
    attention = Attention(bias=(biased,) * 3)
    after = fused(optimize, attention)
    assert ops_of(after) == [
        "aten.linear",
        "aten.split_with_sizes",
        "aten.scaled_dot_product_attention",
    ]
    (denoiser,) = after
    kinds = ("weight", "bias") if biased else ("weight",)
    assert set(denoiser.weights) == {f"blocks.0.attn1.to_qkv.{kind}" for kind in kinds}
    parts = [getattr(attention, f"to_{name}").weight for name in "qkv"]
    assert torch.equal(denoiser.weights["blocks.0.attn1.to_qkv.weight"].load(), torch.cat(parts))
    assert list(calls_of(after, "aten.split_with_sizes")[0].args[1]) == [128, 128, 128]


@pytest.mark.parametrize("scheme", ["int8-block", "fp8-block"])
@pytest.mark.parametrize("first", ["quantize-linear", "fuse-qkv"])
def test_quantized_layers_merge_before_and_after_quantization(optimize, scheme, first):
    attention = Attention(sizes=(256, 256, 256))
    quantize = f"quantize-linear{{scheme={scheme}}}"
    passes = (quantize, "fuse-qkv") if first == "quantize-linear" else ("fuse-qkv", quantize)
    after = fused(optimize, attention, ",".join(("canonicalize", *passes)))
    assert ops_of(after) == [
        "turbo_opt.quantize_activation",
        "turbo_opt.block_linear",
        "aten.split_with_sizes",
        "aten.scaled_dot_product_attention",
    ]
    (denoiser,) = after
    weights = denoiser.weights
    parts = [
        quantize_weight(getattr(attention, f"to_{name}").weight.data, scheme) for name in "qkv"
    ]
    for index, kind in enumerate(("quantized_weight", "weight_scale")):
        expected = torch.cat([part[index] for part in parts])
        found = weights[f"blocks.0.attn1.to_qkv.{kind}"].load()
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_missing_bias_is_a_near_miss(optimize):
    after = fused(optimize, Attention(bias=(True, True, False)), "canonicalize,fuse-qkv?")
    assert reasons_of(after) == ["some of the layers have a bias and some have none"]


def test_quantized_layers_of_half_blocks_are_a_near_miss(optimize):
    text = "canonicalize,quantize-linear,fuse-qkv?"
    after = fused(optimize, Attention(sizes=(64, 64, 64)), text)
    assert reasons_of(after) == ["64 output channels are not whole blocks of 128"]


def test_weights_of_different_dtypes_are_a_near_miss(optimize):
    program = mixed_dtypes(program_of_module(Network(Attention()), X))
    after = optimize(program, "canonicalize,fuse-qkv?")
    assert reasons_of(after) == ["the weights are stored in different dtypes"]


def mixed_dtypes(program):
    """The same graph, as if one weight had been captured in another dtype."""
    (denoiser,) = program
    (node,) = [n for n, name in denoiser.parameters().items() if name.endswith("to_v.weight")]
    node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    name = "blocks.0.attn1.to_v.weight"
    denoiser.weights[name] = constant(denoiser.weights[name].load().bfloat16())
    return program


def test_a_weight_that_serves_another_input_too_is_a_near_miss(optimize):
    class Twice(Attention):
        def forward(self, x):
            return super().forward(x) + self.to_k(x + 1)

    after = fused(optimize, Twice(), "canonicalize,fuse-qkv?")
    assert reasons_of(after) == ["a weight is read by another layer too"]


def test_layers_outside_of_transformer_blocks_are_left_alone(optimize):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()

        def forward(self, x):
            return self.attn(x)

    after = optimize(program_of_module(Flat(), X), "canonicalize,fuse-qkv?")
    assert ops_of(after).count("aten.linear") == 3


@pytest.mark.parametrize("name", ["t2v", "i2v"])
@pytest.mark.parametrize("before", ["", "quantize-linear,", "sparse-attention{proj_l=zero},"])
def test_cross_attention_may_be_left_alone(optimize, name, before):
    text = f"canonicalize,{before}fuse-qkv{{cross_attention=false}}"
    after = optimize(captured_program(VARIANTS[name]), text)
    assert len(calls_of(after, "aten.split_with_sizes")) == 2 + 2  # with two rotary tables
    assert reasons_of(after) == ["k and v of cross-attention, left alone by the recipe"]
    names = set(next(iter(after)).weights)
    assert any(name.startswith("blocks.0.attn1.to_qkv.") for name in names)
    assert not [name for name in names if "kv_proj" in name or "to_kv" in name]


def test_swapped_parts_exceed_the_budget(optimize, monkeypatch):
    from turbo_opt.errors import BudgetExceeded
    from turbo_opt.passes.fuse_qkv import _FuseQKV

    honest = _FuseQKV.replace

    def swapped(self, found, editor):
        new = honest(self, found, editor)
        return dict(zip(new, reversed(new.values()), strict=True))

    monkeypatch.setattr(_FuseQKV, "replace", swapped)
    with pytest.raises(
        BudgetExceeded, match=r"node linear in blocks.0.attn1.to_q: the replacement"
    ):
        fused(optimize, Attention())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.to_q.weight", "a.to_k.weight", "a.to_v.weight"), "a.to_qkv.weight"),
        (("a.to_k.bias", "a.to_v.bias"), "a.to_kv.bias"),
        (("a.add_k_proj.weight_scale", "a.add_v_proj.weight_scale"), "a.add_kv_proj.weight_scale"),
        (("q.weight", "k.weight"), "qk.weight"),
    ],
)
def test_the_merged_layer_is_named_by_its_parts(names, expected):
    assert merged_name(names) == expected


def test_values_and_scales_of_merged_layers_are_computed_once():
    weights = [constant(torch.randn(rows, 256)) for rows in (128, 256)]
    pairs = [block_quantized(weight, "fp8-block") for weight in weights]
    values, scales = (concatenated(*items) for items in zip(*pairs, strict=True))
    assert values.producer == scales.producer
    assert values.shape == (384, 256) and scales.shape == (3, 2)
    expected = quantize_weight(torch.cat([weight.value for weight in weights]), "fp8-block")
    assert torch.equal(scales.load(), expected[1])
    restored = from_json(to_json(values))
    assert restored.digest == values.digest
    store = WeightStore({"values": values, "scales": scales})
    assert [name for name, _ in store.items_by_producer()] == ["values", "scales"]


def test_parts_that_do_not_fill_their_blocks_are_joined_after_quantization():
    pairs = [block_quantized(constant(torch.randn(64, 128)), "int8-block") for _ in range(2)]
    scales = concatenated(*(pair[1] for pair in pairs))
    assert scales.op == "concatenate" and scales.shape == (2, 1)
    assert torch.equal(scales.load(), torch.cat([pair[1].load() for pair in pairs]))


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_self_and_cross_attention_of_every_variant_are_merged(optimize, name, dtype):
    variant = VARIANTS[name]
    before = captured_program(variant, dtype)
    after = optimize(before, "canonicalize,fuse-qkv")
    names = set(next(iter(after)).weights)
    assert "blocks.0.attn1.to_qkv.weight" in names
    assert "blocks.1.attn2.to_kv.bias" in names
    assert ("blocks.1.attn2.add_kv_proj.weight" in names) == (name in ("i2v", "flf2v"))
    assert not {"blocks.0.attn1.to_q.weight", "blocks.1.attn2.to_v.weight"} & names
    inputs = random_inputs(variant, 1, 2, 8, 8, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= (110 if dtype == torch.float32 else 45)
