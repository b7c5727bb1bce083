"""fuse-norms: graphs before and after, near misses, parity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from tests.helpers.variants import (
    IN_EVERY_DTYPE,
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
)
from tests.passes.graphs import ops_of, program_of
from turbo_opt.compiler.verification import sqnr_db
from turbo_opt.errors import BadInput, PassFailed

PIPELINE = "canonicalize,fuse-norms"
X = torch.randn(2, 6, 16)
SCALE, SHIFT = torch.randn(2, 1, 16), torch.randn(2, 1, 16)
W, B = torch.randn(16), torch.randn(16)


def adaln(x, scale, shift):
    return (layer_norm(x.float(), (16,), eps=1e-6) * (1 + scale) + shift).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_with_modulation_becomes_adaln(optimize, dtype):
    after = optimize(program_of(adaln, X.to(dtype), SCALE, SHIFT), PIPELINE)
    assert ops_of(after) == ["turbo_opt.adaln"]


def test_operands_may_stand_the_other_way_round(optimize):
    def net(x, scale, shift):
        return shift + (scale + 1) * layer_norm(x, (16,))

    after = optimize(program_of(net, X, SCALE, SHIFT), PIPELINE)
    assert ops_of(after) == ["turbo_opt.adaln"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_affine_layer_norm_becomes_one_operator(optimize, dtype):
    def net(x, w, b):
        return layer_norm(x.float(), (16,), w, b, 1e-6).type_as(x)

    after = optimize(program_of(net, X.to(dtype), w=W, b=B), PIPELINE)
    assert ops_of(after) == ["turbo_opt.layer_norm"]


def test_rms_norm_becomes_one_operator(optimize):
    after = optimize(program_of(lambda x, w: rms_norm(x, (16,), w, 1e-6), X, w=W), PIPELINE)
    assert ops_of(after) == ["turbo_opt.rms_norm"]


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (
            lambda x, s, t: layer_norm(x, (16,)) * s + t,
            "the factor of the LayerNorm is not 1 + scale",
        ),
        (
            lambda x, s, t: layer_norm(x, (16,)) * (1 + s) * t,
            "the scaled LayerNorm is not followed by one added shift",
        ),
        (
            lambda x, s, t: layer_norm(x, (16,)) + t,
            "the LayerNorm is not followed by one product with (1 + scale)",
        ),
        (
            lambda x, s, t: layer_norm(x.bfloat16().float(), (16,)) * (1 + s) + t,
            "the result stays in torch.float32 while x is torch.bfloat16",
        ),
    ],
)
def test_a_near_miss_says_why(optimize, net, reason):
    after = optimize(program_of(net, X, SCALE, SHIFT), "canonicalize,fuse-norms?")
    assert [miss["reason"] for miss in after.history[1]["near_misses"]] == [reason]
    assert "turbo_opt.adaln" not in ops_of(after)


def test_an_intermediate_that_is_read_elsewhere_is_not_fused_away(optimize):
    def net(x, scale, shift):
        normal = layer_norm(x, (16,))
        return normal * (1 + scale) + shift + normal

    after = optimize(program_of(net, X, SCALE, SHIFT), "canonicalize,fuse-norms?")
    assert "turbo_opt.adaln" not in ops_of(after)


def test_a_required_pass_that_matches_nothing_fails_and_names_the_near_misses(optimize):
    with pytest.raises(PassFailed, match=r"fuse-norms matched nothing.*not 1 \+ scale"):
        optimize(
            program_of(lambda x, s, t: layer_norm(x, (16,)) * s + t, X, SCALE, SHIFT), PIPELINE
        )


def test_without_canonicalize_the_error_says_what_to_add(optimize):
    with pytest.raises(BadInput, match="add 'canonicalize' before 'fuse-norms'"):
        optimize(program_of(adaln, X, SCALE, SHIFT), "fuse-norms")


def test_a_wrong_order_says_what_to_move(optimize):
    with pytest.raises(BadInput, match="move 'canonicalize' before 'fuse-norms'"):
        optimize(program_of(adaln, X, SCALE, SHIFT), "fuse-norms,canonicalize")


def test_options_leave_kinds_of_norms_alone(optimize):
    program = program_of(adaln, X, SCALE, SHIFT)
    after = optimize(program, "canonicalize,fuse-norms?{adaln=false}")
    assert "aten.layer_norm" in ops_of(after)


@pytest.mark.parametrize(("name", "dtype"), IN_EVERY_DTYPE)
def test_every_norm_of_every_variant_is_fused_without_loss(optimize, name, dtype):
    variant = VARIANTS[name]
    before = captured_program(variant, dtype)
    after = optimize(before, PIPELINE)
    assert not {"aten.layer_norm", "aten.rms_norm"} & set(ops_of(after))
    inputs = random_inputs(variant, 1, 2, 8, 8, dtype)
    with torch.no_grad():
        expected, found = compiled(before)(**inputs).sample, compiled(after)(**inputs).sample
    assert sqnr_db(expected, found) >= (110 if dtype == torch.float32 else 40)
