"""sla(q, k, v) = softmax attention over chosen key blocks + proj(linear branch)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.attention_checks import (
    BLOCKS,
    assert_attends,
    heads_of_one_product,
    heads_on_meta,
    linear_branch,
    projection,
    sparse_linear,
    sparsity_on_meta,
)
from tests.kernels.kernel_checks import assert_opcheck, provider_cases, relative_error, run_by
from turbo_opt.kernels import OperatorInputError, choose, explain, sla

FEATURE_MAPS = ["softmax", "elu", "relu"]
# The reference sums in float32; the Triton kernels multiply in float16 on a CPU, as Triton's
# interpreter multiplies bfloat16 wrongly.
each_case = provider_cases(("reference", torch.float32, 1e-5), ("triton", torch.float16, 2e-3))


@each_case
@pytest.mark.parametrize(
    ("batch", "heads", "length", "blocks", "topk", "feature_map"),
    [
        (1, 1, 1, (64, 128), 0.5, "softmax"),
        (1, 2, 129, (64, 128), 0.5, "elu"),  # the last key block holds one token
        (2, 1, 200, (64, 64), 0.6, "relu"),
        (1, 1, 257, (128, 64), 0.3, "softmax"),  # the last blocks of both hold one token
        (1, 1, 150, (128, 128), 1.0, "softmax"),
    ],
)
def test_sla_equals_its_definition(
    provider, dtype, largest_error, batch, heads, length, blocks, topk, feature_map, device
):
    q, k, v = heads_of_one_product(batch, heads, length, dtype, device)
    args = (q, k, v, *projection(device), topk, *blocks, feature_map)
    assert_attends(sparse_linear(*args), provider, "sla", args, largest_error)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 300),
    block_q=st.sampled_from([64, 128]),
    block_k=st.sampled_from([64, 128]),
    topk=st.floats(0.01, 1),
    feature_map=st.sampled_from(FEATURE_MAPS),
    seed=st.integers(0, 2**31),
)
def test_the_reference_equals_the_definition_at_any_size(
    batch, length, block_q, block_k, topk, feature_map, seed
):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, batch, 2, length, 16)
    args = (q, k, v, *projection("cpu", 16), topk, block_q, block_k, feature_map)
    assert_attends(sparse_linear(*args), "reference", "sla", args, 2e-5)


@each_case
@pytest.mark.parametrize("feature_map", [None, "softmax"])
def test_with_every_block_kept_it_is_dense_attention(
    provider, dtype, largest_error, feature_map, device
):
    q, k, v = heads_of_one_product(1, 2, 130, dtype, device)
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double())
    weight = None
    if feature_map:
        weight = torch.eye(128, device=device)
        expected = expected + linear_branch(q, k, v, feature_map)
    args = (q, k, v, weight, None, 1.0, 128, 64, feature_map or "softmax")
    assert_attends(expected, provider, "sla", args, largest_error)


@each_case
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_linear_branch_is_what_the_projection_adds(
    provider, dtype, largest_error, feature_map, device
):
    q, k, v = heads_of_one_product(1, 1, 150, dtype, device)
    v = v + 2  # else it is much smaller than the sum that it is read from
    weight, _ = projection(device)
    with_branch, without = (
        run_by(provider, "sla", q, k, v, each, None, 0.5, 64, 64, feature_map).double()
        for each in (weight, None)
    )
    expected = linear_branch(q, k, v, feature_map) @ weight.double().T
    assert relative_error(expected, with_branch - without) < 0.01


@each_case
def test_dense_strides_and_a_strided_head_dim(provider, dtype, largest_error, device):
    q, k, v = torch.randn(3, 1, 2, 70, 128, device=device, dtype=dtype)
    k = k.mT.contiguous().mT  # tokens lie together, not channels
    args = (q, k, v, *projection(device), 0.5, 64, 64, "softmax")
    assert_attends(sparse_linear(*args), provider, "sla", args, largest_error)


@each_case
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_equal_tokens_give_their_value(provider, dtype, largest_error, feature_map, device):
    """All scores are equal; with zeros, relu's branch is 0 / 1e-5."""
    for value in (0.0, 1.5):
        q = torch.full((1, 1, 70, 128), value, device=device, dtype=dtype)
        weight = torch.zeros(128, 128, device=device)
        o = run_by(provider, "sla", q, q, q, weight, None, 0.5, 64, 64, feature_map)
        torch.testing.assert_close(o, q, rtol=largest_error, atol=0)


@each_case
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_huge_outliers_leave_no_nan(provider, dtype, largest_error, feature_map, device):
    q, k, v = heads_of_one_product(1, 1, 70, dtype, device)
    huge = 1e15 if dtype is torch.float32 else 6e4 if feature_map == "softmax" else 1e3
    for token, x in enumerate((q, k, v)):
        x[0, 0, token, 5] = huge
    k[0, 0, 66] = -huge
    weight = torch.eye(128, device=device) / 8
    o = run_by(provider, "sla", q, k, v, weight, None, 1.0, 64, 64, feature_map)
    assert o.isfinite().all()


def test_many_keys_of_one_feature_do_not_overflow_float16(device):
    """300 tokens of value 300 stand for 75,600 tokens of value 1.2: φ(k) is 1 in one channel."""
    q, k, v = heads_of_one_product(1, 1, 300, torch.float16, device)
    k = k.clone()
    k[..., 0] = 50
    args = (q, k, v + 300, torch.eye(128, device=device), None, 0.5, 64, 64, "softmax")
    assert_attends(sparse_linear(*args), "triton", "sla", args, 2e-3)


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 70, 128), (1, 2, 0, 128)])
def test_no_tokens_give_no_tokens(provider, shape, device):
    q = torch.randn(shape, device=device, dtype=torch.float16)
    args = (q, q, q, *projection(device), 0.5, 64, 64, "softmax")
    assert run_by(provider, "sla", *args).shape == shape


def test_opcheck(device):
    q, k, v = torch.randn(3, 1, 2, 70, 128, device=device, dtype=torch.float16)
    assert_opcheck("sla", q, k, v, *projection(device), 0.5, 64, 64, "softmax")


def arguments(dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    named = {**heads_on_meta(dtype, head_dim), **sparsity_on_meta(head_dim, 128, 64)}
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "provider"),
    [("sm80", "triton"), ("sm90", "triton"), ("sm120", "triton"), ("sm75", "reference")],
)
def test_choice_on_described_devices(device_name, provider):
    assert choose("sla", device_name, *arguments()) == provider
    assert choose("sla", "cpu", *arguments()) == "reference"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "16-bit operands"),
        ({"head_dim": 64}, "head dimension of 64"),
    ],
)
def test_what_triton_does_not_serve_is_explained(changes, reason):
    choice = explain("sla", "sm90", *arguments(**changes))
    assert choice.provider == "reference" and reason in choice.passed_over["triton"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 2, 300, 128).double()}, "must share bfloat16, float16 or float32"),
        ({"k": torch.ones(1, 2, 300, 128).half()}, "got torch.bfloat16, torch.float16 and"),
        ({"v": torch.ones(1, 2, 299, 128).bfloat16()}, r"\(1, 2, 299, 128\)"),
        ({"q": torch.ones(2, 300, 128).bfloat16()}, r"must be \(B, H, L, D\) alike"),
        ({"proj_weight": None}, "proj_bias is given without proj_weight"),
        ({"proj_weight": torch.ones(128, 64)}, r"proj_weight must be \(128, 128\), got \(128, 64"),
        ({"proj_bias": torch.ones(64)}, r"proj_bias must be \(128,\), got \(64,\)"),
        ({"topk": 0.0}, "topk must be above 0 and at most 1, got 0.0"),
        ({"topk": 1.5}, "topk must be above 0 and at most 1, got 1.5"),
        ({"block_q": 32}, "block_q must be 64 or 128, got 32"),
        ({"block_k": 256}, "block_k must be 64 or 128, got 256"),
        ({"feature_map": "softmaks"}, "'softmaks': did you mean 'softmax'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^sla: .*{message}"):
        sla(*arguments(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "topk"),
    [(1, 2000, 2, 0.2), (2, 777, 3, 0.4), (1, 1, 2, 0.5), (1, 129, 1, 1.0)],
)
def test_bfloat16_on_the_gpu(batch, length, heads, topk, blocks, projected, device):
    q, k, v = heads_of_one_product(batch, heads, length, torch.bfloat16, device)
    weight, bias = projection(device) if projected else (None, None)
    args = (q, k, v, weight, bias, topk, *blocks, "softmax")
    assert_attends(run_by("reference", "sla", *args), "triton", "sla", args, 0.01)
