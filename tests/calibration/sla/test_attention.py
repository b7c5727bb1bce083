"""Trainable sparse-linear attention is `turbo_opt::sla` with a derivative."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import heads_of_one_product, projection, sparse_linear
from tests.kernels.kernel_checks import relative_error, sqnr_db
from turbo_opt.calibration.sla.attention import (
    Sparsity,
    choose_blocks,
    linear_branch,
    sparse_branch,
)
from turbo_opt.kernels import sla
from turbo_opt.kernels.sla.reference import route

FEATURE_MAPS = ["softmax", "elu", "relu"]


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("length", "block_q", "block_k"), [(200, 64, 64), (257, 128, 64)])
def test_it_computes_what_the_operator_computes(feature_map, length, block_q, block_k) -> None:
    torch.manual_seed(0)
    q, k, v = heads_of_one_product(2, 2, length, torch.float32, "cpu")
    weight, bias = projection("cpu")
    sparsity = Sparsity(0.5, block_q, block_k, feature_map)
    linear = linear_branch(q, k, v, feature_map)
    o = sparse_branch(q, k, v, sparsity) + torch.nn.functional.linear(linear, weight, bias)
    expected = sla(q, k, v, weight, bias, 0.5, block_q, block_k, feature_map)
    assert sqnr_db(expected, o) > 110
    assert torch.equal(choose_blocks(q, k, sparsity), route(q, k, 0.5, block_q, block_k))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_its_gradient_is_that_of_the_definition(feature_map) -> None:
    torch.manual_seed(0)
    inputs = heads_of_one_product(1, 2, 150, torch.float32, "cpu")
    weight, bias = projection("cpu")
    mine = [x.clone().requires_grad_() for x in (*inputs, weight, bias)]
    exact = [x.double().requires_grad_() for x in (*inputs, weight, bias)]
    grad_o = torch.randn_like(inputs[0])

    *heads, w, b = mine
    linear = linear_branch(*heads, feature_map)
    o = sparse_branch(*heads, Sparsity(0.5, 64, 64)) + torch.nn.functional.linear(linear, w, b)
    o.backward(grad_o)
    sparse_linear(*exact, 0.5, 64, 64, feature_map).backward(grad_o.double())
    for ours, theirs in zip(mine, exact, strict=True):
        assert relative_error(theirs.grad, ours.grad) < 1e-4


def test_bfloat16_stays_close_and_keeps_its_dtype() -> None:
    torch.manual_seed(0)
    q, k, v = heads_of_one_product(1, 2, 200, torch.float32, "cpu")
    half = linear_branch(q.bfloat16(), k.bfloat16(), v.bfloat16(), "softmax")
    assert half.dtype is torch.bfloat16
    assert relative_error(linear_branch(q, k, v, "softmax"), half) < 0.02


def test_many_alike_keys_stay_within_float16() -> None:
    q = torch.zeros(1, 1, 300, 128, dtype=torch.float16)
    q[..., 0] = 50
    linear = linear_branch(q, q, torch.full_like(q, 300), "softmax")
    torch.testing.assert_close(linear, torch.full_like(q, 300))
