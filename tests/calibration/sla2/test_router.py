"""Routed attention that can be trained is `turbo_opt::sla2` with a derivative."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import heads_of_one_product
from tests.kernels.kernel_checks import relative_error
from turbo_opt.calibration.sla.attention import Sparsity, sparse_branch
from turbo_opt.calibration.sla2.compare import Seen, compare, keep_highest
from turbo_opt.calibration.sla2.router import (
    Routers,
    attend_routed,
    routed_attention,
    router_names,
)
from turbo_opt.calibration.sla2.soft import soft_topk
from turbo_opt.kernels import block_sparse_attention, sla2

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
SPARSITY = Sparsity(0.5, 64, 64)
QUANTIZED = Sparsity(0.5, 64, 64, quantized=True)


def learned(dtype=torch.float32):
    """A layer's router and ratio with values unlike those they begin with."""
    torch.manual_seed(0)
    (layer,) = Routers(CONFIG).layers()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return layer.to(dtype)


def heads(length, dtype=torch.float32, batch=1):
    torch.manual_seed(1)
    return heads_of_one_product(batch, 2, length, dtype, "cpu", head_dim=16)


def by_operator(layer, q, k, v, sparsity, *formats):
    router, alpha = layer.router, layer.alpha
    weights = (router.proj_q.weight, router.proj_k.weight, alpha.weight, alpha.bias)
    blocks = (sparsity.block_q, sparsity.block_k)
    return sla2(q, k, v, *weights, sparsity.topk, *blocks, sparsity.feature_map, *formats)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize(("length", "block_q", "block_k"), [(200, 64, 64), (257, 128, 64)])
def test_it_computes_what_the_operator_computes(feature_map, length, block_q, block_k):
    layer, sparsity = learned(), Sparsity(0.5, block_q, block_k, feature_map)
    qkv = heads(length, batch=2)
    with torch.no_grad():
        o = attend_routed(sparsity)(layer, *qkv)
        assert relative_error(by_operator(layer, *qkv, sparsity), o) < 1e-6


def test_with_every_block_it_is_dense_attention():
    qkv = heads(130)
    o = attend_routed(Sparsity(1.0, 64, 64))(learned(), *qkv)
    assert relative_error(scaled_dot_product_attention(*qkv), o) < 1e-6


def test_gradcheck_in_float64():
    layer = learned(torch.float64)
    q, k, v = torch.randn(3, 1, 2, 70, 16, dtype=torch.float64)
    alpha = (layer.alpha.weight.detach(), layer.alpha.bias.detach())
    inputs = [x.requires_grad_() for x in (*alpha, q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *given: routed_attention(layer.router, *given, SPARSITY), inputs, fast_mode=True
    )


def test_only_the_choice_of_blocks_is_without_a_gradient():
    layer = learned()
    attend_routed(SPARSITY)(layer, *heads(130)).square().sum().backward()
    assert layer.router.proj_q.weight.grad is None
    assert layer.alpha.weight.grad.any() and layer.alpha.bias.grad.any()


def test_quantized_it_has_the_values_of_8_bits():
    layer, qkv = learned(), heads(200)
    with torch.no_grad():
        exact, o = (attend_routed(each)(layer, *qkv) for each in (SPARSITY, QUANTIZED))
    assert relative_error(by_operator(layer, *qkv, QUANTIZED, "int8", "fp8"), o) < 1e-6
    assert 1e-3 < relative_error(exact, o) < 0.05


def test_quantized_the_sparse_branch_has_the_gradient_of_16_bits():
    qkv = [x.clone().requires_grad_() for x in heads(200)]
    exact, o = (sparse_branch(*qkv, each) for each in (SPARSITY, QUANTIZED))
    assert relative_error(exact, o) > 1e-3
    grad = torch.randn_like(o)
    mine, theirs = (torch.autograd.grad(x, qkv, grad) for x in (o, exact))
    for ours, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, expected)


def test_bfloat16_stays_close_and_keeps_its_dtype():
    layer, qkv = learned(), heads(200)
    o = attend_routed(SPARSITY)(layer, *(x.bfloat16() for x in qkv))
    assert o.dtype is torch.bfloat16
    assert relative_error(attend_routed(SPARSITY)(layer, *qkv), o) < 0.02


def test_processes_that_share_a_clip_take_the_ratios_of_their_heads(monkeypatch):
    layer, (q, k, v) = learned(), heads(130)
    with torch.no_grad():
        whole = attend_routed(SPARSITY)(layer, q, k, v)
        for rank in range(2):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
            own = attend_routed(SPARSITY, SimpleNamespace())(
                layer, *(x[:, rank : rank + 1] for x in (q, k, v))
            )
            torch.testing.assert_close(own, whole[:, rank : rank + 1])


def test_names_are_those_of_the_weights_that_the_pass_reads():
    assert router_names(CONFIG) == [
        "blocks.0.attn1.router.proj_q.weight",
        "blocks.0.attn1.router.proj_k.weight",
        "blocks.0.attn1.alpha.weight",
        "blocks.0.attn1.alpha.bias",
    ]


def test_it_begins_as_the_choice_by_block_means():
    (layer,) = Routers(CONFIG).reset().layers()
    assert torch.equal(layer.router.proj_q.weight, torch.eye(16))
    assert not layer.alpha.weight.any() and (layer.alpha.bias == 1).all()


def compared(layer, qkv, choose, blocks, sparsity=SPARSITY):
    return compare(layer, Seen(*qkv, torch.tensor(blocks)), sparsity, choose)


def in_blocks(o, blocks, block=64):
    padded = torch.nn.functional.pad(o, (0, 0, 0, -o.shape[2] % block))
    return padded.unflatten(2, (-1, block))[:, :, blocks]


@pytest.mark.parametrize("blocks", [[0, 1, 2, 3], [3, 1]])
def test_with_hard_choices_the_comparison_shows_what_the_operators_give(blocks):
    layer, (q, k, v) = learned(), heads(200)
    with torch.no_grad():
        found = compared(layer, (q, k, v), keep_highest, blocks)
        lists = torch.zeros(1, 2, 4, 2, dtype=torch.int32)
        lists[..., 1] = 3  # not those of the router
        other, _ = block_sparse_attention(q, k, v, lists, 64, 64)
        expected = {
            "routed": by_operator(layer, q, k, v, SPARSITY),
            "dense": scaled_dot_product_attention(q, k, v),
        }
    for name, o in expected.items():
        assert relative_error(in_blocks(o, blocks), getattr(found, name)) < 1e-5, name
    assert relative_error(in_blocks(other, blocks), found.sparse) > 0.1


def test_soft_choices_become_hard_ones_as_they_cool():
    layer, qkv = learned(), heads(260)
    hard = compared(layer, qkv, keep_highest, [0, 1, 2, 3, 4]).routed
    errors = []
    for temperature in (1.0, 0.1, 1e-5):
        choose = lambda s, keep, t=temperature: soft_topk(s, keep, t)  # noqa: E731
        errors.append(relative_error(hard, compared(layer, qkv, choose, [0, 1, 2, 3, 4]).routed))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_gradients_reach_the_router_through_soft_choices():
    layer, qkv = learned(torch.float64), heads(150, torch.float64)

    def error():
        found = compared(layer, qkv, lambda s, keep: soft_topk(s, keep, 0.5), [0, 2])
        return (found.routed - found.dense).square().sum()

    weight = layer.router.proj_k.weight
    (grad,) = torch.autograd.grad(error(), [weight])
    step = 1e-5 * torch.randn_like(grad)
    with torch.no_grad():
        weight.add_(step)
        above = error()
        weight.sub_(2 * step)
        difference = float(above - error()) / 2
    assert difference == pytest.approx(float((grad * step).sum()), rel=1e-4)
