"""canonicalize: each rule before and after, and bit-for-bit equality on every Wan variant."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import (
    IN_EVERY_DTYPE,
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
)
from tests.passes.graphs import ops_of, program_of

X = torch.randn(2, 6, 8)


def test_casts_to_the_same_dtype_dropout_and_products_with_one_disappear(optimize):
    def net(x):
        x = torch.dropout(x.float() * 1, 0.5, False)
        return x.type_as(x).contiguous() + 2

    before = program_of(net, X)
    assert len(ops_of(before)) > 1
    assert ops_of(optimize(before, "canonicalize")) == ["aten.add.Tensor"]


def test_a_cast_that_changes_the_dtype_stays_and_type_as_becomes_a_plain_cast(optimize):
    def net(x, y):
        return x.type_as(y) + y

    after = optimize(program_of(net, X, X.bfloat16()), "canonicalize")
    assert ops_of(after) == ["aten.to.dtype", "aten.add.Tensor"]


def test_a_product_with_two_stays(optimize):
    after = optimize(program_of(lambda x: x * 2, X), "canonicalize")
    assert ops_of(after) == ["aten.mul.Tensor"]


def test_writes_into_interleaved_halves_become_a_stack(optimize):
    def net(x, y):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * y[..., 0::2]
        out[..., 1::2] = x[..., 1::2] + y[..., 1::2]
        return out * 2

    before = program_of(net, X, X.flip(0))
    after = optimize(before, "canonicalize")
    assert "aten.copy_" in ops_of(before)
    assert "aten.copy_" not in ops_of(after)
    assert ops_of(after)[-3:] == ["aten.stack", "aten.flatten.using_ints", "aten.mul.Tensor"]
    assert not after.history[0]["near_misses"]


def test_writes_that_cast_keep_the_cast(optimize):
    def net(x, y):
        out = torch.empty_like(x)
        out[..., 0::2] = y[..., 0::2]
        out[..., 1::2] = y[..., 1::2] * 3
        return out + 1

    after = optimize(program_of(net, X.bfloat16(), X), "canonicalize")
    assert ops_of(after).count("aten.to.dtype") == 2
    assert "aten.copy_" not in ops_of(after)


def test_a_half_that_is_never_written_is_a_near_miss_with_the_reason(optimize):
    def net(x):
        out = torch.zeros_like(x).copy_(x)
        buffer = torch.empty_like(x)
        buffer[..., 0::2] = out[..., 0::2]
        return buffer + out

    after = optimize(program_of(net, X), "canonicalize", verify="off")
    reasons = [miss["reason"] for miss in after.history[0]["near_misses"]]
    assert reasons == ["only one interleaved half of an empty tensor is written"]


def test_constants_are_folded_into_a_stored_table(optimize):
    def net(x):
        table = torch.exp(torch.arange(8, dtype=torch.float32) * -0.5)
        return x * table

    after = optimize(program_of(net, X), "canonicalize")
    assert ops_of(after) == ["aten.mul.Tensor"]
    (denoiser,) = after
    table = denoiser.weights["constants.table_0"].load()
    assert torch.equal(table, torch.exp(torch.arange(8, dtype=torch.float32) * -0.5))


def test_random_numbers_are_not_folded(optimize):
    after = optimize(program_of(lambda x: x + torch.rand(8), X), "canonicalize")
    assert "aten.rand" in ops_of(after)


def test_equal_calls_are_shared_and_unequal_ones_are_not(optimize):
    def net(x):
        return torch.exp(x) + torch.exp(x) * torch.exp(x + 1)

    after = optimize(program_of(net, X), "canonicalize")
    assert ops_of(after).count("aten.exp") == 2


def test_true_and_one_are_different_arguments(optimize):
    def net(x):
        return torch.sum(x, 1, True) + torch.sum(x, 1, False).unsqueeze(1)

    after = optimize(program_of(net, X), "canonicalize")
    assert len([name for name in ops_of(after) if name.startswith("aten.sum")]) == 2


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_every_variant_keeps_every_bit(optimize, name, dtype):
    variant = VARIANTS[name]
    before = captured_program(variant, dtype)
    after = optimize(before, "canonicalize")
    inputs = random_inputs(variant, 1, 2, 8, 8, dtype)
    with torch.no_grad():
        assert torch.equal(compiled(after)(**inputs).sample, compiled(before)(**inputs).sample)
    ops = ops_of(after)
    assert not {"aten.copy_", "aten._assert_tensor_metadata", "aten.dropout"} & set(ops)
    assert after.history[0]["verification"]["bitwise"]


def test_canonical_graph_is_a_fixed_point(optimize):
    once = optimize(captured_program(VARIANTS["t2v"]), "canonicalize")
    twice = optimize(once, "canonicalize")
    assert twice.history[1]["matches"] == 0
    assert ops_of(once) == ops_of(twice)
