"""fuse-qk-norm-rope: graphs before and after, near misses, what is verified, parity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from tests.helpers.variants import (
    IN_EVERY_DTYPE,
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
)
from tests.passes.graphs import calls_of, ops_of, program_of, reasons_of
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput, BudgetExceeded

BASE = "canonicalize,fuse-norms?,"
X = torch.randn(2, 70, 32)
PROJECTIONS = torch.randn(2, 70, 3 * 256)
W = torch.randn(256)
ANGLES = torch.randn(1, 70, 1, 64)
COS, SIN = ANGLES.cos().repeat_interleave(2, -1), ANGLES.sin().repeat_interleave(2, -1)


def rotate(x, cos, sin):
    """As diffusers does it: writes into the interleaved halves."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = first * cos[..., 0::2] - second * sin[..., 1::2]
    out[..., 1::2] = first * sin[..., 1::2] + second * cos[..., 0::2]
    return out.type_as(x)


def norm_rope(x, cos, sin, w):
    return rotate(rms_norm(x, (256,), w, 1e-6).unflatten(2, (2, -1)), cos, sin) * 2


def attention(projections, cos, sin, wq, wk):
    wide = torch.eye(768, dtype=projections.dtype)
    q, k, v = (linear(projections, part) for part in wide.split(256))
    heads = (
        rotate(rms_norm(q, (256,), wq, 1e-6).unflatten(2, (2, -1)), cos, sin),
        rotate(rms_norm(k, (256,), wk, 1e-6).unflatten(2, (2, -1)), cos, sin),
        v.unflatten(2, (2, -1)),
    )
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads))
    return out.transpose(1, 2).flatten(2, 3) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_and_rotation_become_one_operator(optimize, dtype):
    before = program_of(norm_rope, PROJECTIONS[..., :256].to(dtype), COS, SIN, w=W.to(dtype))
    after = optimize(before, f"{BASE}fuse-qk-norm-rope")
    names = [name for name in ops_of(after) if name != "aten.slice.Tensor"]
    assert names == ["aten.clone", "aten.clone", "turbo_opt.norm_rope", "aten.mul.Tensor"]
    (call,) = calls_of(after, "turbo_opt.norm_rope")
    assert call.meta["val"].dtype == dtype
    tables = [table.meta["val"] for table in call.args[2:4]]
    assert [tuple(table.shape) for table in tables] == [(1, 70, 1, 64)] * 2
    assert all(table.is_contiguous() for table in tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8_bit_attention_takes_the_projections(optimize, dtype):
    weights = {"wq": W.to(dtype), "wk": W.flip(0).to(dtype)}
    before = program_of(attention, PROJECTIONS.to(dtype), COS, SIN, **weights)
    text = f"{BASE}sparse-attention{{proj_l=zero topk=0.5}},fuse-qk-norm-rope"
    after = optimize(before, text)
    assert ops_of(after)[-2:] == ["turbo_opt.norm_rope_sagesla", "aten.mul.Tensor"]
    assert not {"turbo_opt.norm_rope", "aten.permute", "aten.stack"} & set(ops_of(after))
    (call,) = calls_of(after, "turbo_opt.norm_rope_sagesla")
    assert [node.name for node in call.args[3:5]] == ["p_wq", "p_wk"]
    assert call.args[7:] == (1e-6, None, None, 0.5, 128, 64, "softmax", "16bit")


@pytest.mark.parametrize("mode", ["dense", "sla"])
def test_other_attention_keeps_its_heads(optimize, mode):
    sparse = "sparse-attention{mode=sla proj_l=zero}," if mode == "sla" else ""
    before = program_of(attention, PROJECTIONS, COS, SIN, wq=W, wk=W)
    after = optimize(before, f"{BASE}{sparse}fuse-qk-norm-rope")
    names = ops_of(after)
    assert names.count("turbo_opt.norm_rope") == 2
    attend = "turbo_opt.sla" if mode == "sla" else "aten.scaled_dot_product_attention"
    assert attend in names


def test_a_second_run_fuses_attention_that_became_sparse_in_between(optimize):
    before = program_of(attention, PROJECTIONS, COS, SIN, wq=W, wk=W)
    text = "fuse-qk-norm-rope,sparse-attention{proj_l=zero},fuse-qk-norm-rope"
    assert "turbo_opt.norm_rope_sagesla" in ops_of(optimize(before, BASE + text))


def other_rotation(first, second, cos, sin):
    return first * cos + second * sin, first * sin - second * cos


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda x, c, s, w: torch.stack(
                other_rotation(*x.unflatten(-1, (2, 64, 2)).unbind(-1), c[..., ::2], s[..., ::2]),
                -1,
            ).flatten(-2),
            "the interleaved halves are not a rotation (a·cos − b·sin, a·sin + b·cos)",
        ),
        (
            lambda x, c, s, w: rotate(x.reshape(2, 70, 2, 128), c, s) * 2,
            "what is rotated are not the heads of a (B, L, C) tensor",
        ),
        (
            lambda x, c, s, w: rotate(x.unflatten(2, (2, -1)), c, s) * 2,
            "what is rotated is not the result of an RMSNorm for that alone",
        ),
        (
            lambda x, c, s, w: norm_rope(x, c[:, :1], s[:, :1], w),
            "cos and sin are not float32 (1, L, 1, D/2)",
        ),
    ],
)
def test_a_near_miss_says_why(optimize, net, reason):
    program = program_of(net, PROJECTIONS[..., :256], COS, SIN, w=W)
    after = optimize(program, f"{BASE}fuse-qk-norm-rope?")
    assert reasons_of(after) == [reason]


def sparse(q, k, v):
    return torch.ops.turbo_opt.sagesla.default(
        *(x.transpose(1, 2) for x in (q, k, v)), None, None, 0.5, 64, 64, "softmax", "16bit"
    )


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda x, c, s, w: sparse(*(x.unflatten(2, (2, 128)) for _ in range(3))),
            "q and k do not come from an RMSNorm and a rotation",
        ),
        (
            lambda x, c, s, w: sparse(
                torch.ops.turbo_opt.norm_rope(x, w, c[..., ::2], s[..., ::2], 1e-6),
                torch.ops.turbo_opt.norm_rope(x, w, s[..., ::2], c[..., ::2], 1e-6),
                x.unflatten(2, (2, 128)),
            ),
            "q and k are not rotated by the same angles, or differ in epsilon",
        ),
        (
            lambda x, c, s, w: sparse(
                torch.ops.turbo_opt.norm_rope(x, w, c[..., ::2], s[..., ::2], 1e-6),
                torch.ops.turbo_opt.norm_rope(x, w, c[..., ::2], s[..., ::2], 1e-6),
                x.unflatten(2, (2, 128)) * 2,
            ),
            "v is not the heads of a (B, L, C) tensor",
        ),
        (
            lambda x, c, s, w: sparse(
                torch.ops.turbo_opt.norm_rope(x, w, c[..., ::2], s[..., ::2], 1e-6),
                torch.ops.turbo_opt.norm_rope(x, w, c[..., ::2], s[..., ::2], 1e-6),
                x.unflatten(2, (2, 128)),
            ),
            "the result is not brought back to (B, L, C) at once",
        ),
    ],
)
def test_a_near_miss_of_attention_says_why(optimize, net, reason):
    program = program_of(net, PROJECTIONS[..., :256], COS, SIN, w=W)
    after = optimize(program, f"{BASE}fuse-qk-norm-rope?")
    assert reasons_of(after) == [reason]


def test_norms_must_be_fused_before(optimize):
    before = program_of(attention, PROJECTIONS, COS, SIN, wq=W, wk=W)
    with pytest.raises(BadInput, match="add 'fuse-norms' before 'fuse-qk-norm-rope'"):
        optimize(before, "canonicalize,fuse-qk-norm-rope")


@pytest.mark.parametrize("wrong", [slice(3, 5), slice(5, 7)], ids=["weights", "tables"])
def test_swapped_operands_exceed_the_budget(optimize, monkeypatch, wrong):
    from turbo_opt.passes import fuse_qk_norm_rope as module

    honest = module.emit_attention

    def swapped(found, editor):
        new = honest(found, editor)
        args = list(new.args)
        args[wrong] = args[wrong][::-1]
        new.args = tuple(args)
        return new

    monkeypatch.setattr(module, "emit_attention", swapped)
    before = program_of(attention, PROJECTIONS, COS, SIN, wq=W, wk=W.flip(0))
    with pytest.raises(BudgetExceeded, match="budget of 'reorders'"):
        optimize(before, f"{BASE}sparse-attention{{proj_l=zero topk=0.5}},fuse-qk-norm-rope")


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
@pytest.mark.parametrize("sparse", ["", ",sparse-attention{proj_l=zero topk=0.5}"])
def test_every_self_attention_of_every_variant_is_fused(optimize, name, dtype, sparse):
    variant = VARIANTS[name]
    text = f"canonicalize,fuse-norms{sparse}"
    before = optimize(captured_program(variant, dtype), text, "off")
    after = optimize(captured_program(variant, dtype), f"{text},fuse-qk-norm-rope")
    layers = 4 if name == "vace" else 2
    fused = "turbo_opt.norm_rope_sagesla" if sparse else "turbo_opt.norm_rope"
    assert len(calls_of(after, fused)) == (layers if sparse else 2 * layers)
    assert "aten.stack" not in ops_of(after)
    inputs = random_inputs(variant, 1, 2, 16, 16, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= (110 if dtype == torch.float32 else 42)
