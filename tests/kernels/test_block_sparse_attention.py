"""block_sparse_attention(q, k, v, lists), against dense masked attention."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.attention_checks import heads_of_one_product, heads_on_meta
from tests.kernels.block_sparse_checks import (
    LARGEST_ERROR,
    each_case,
    each_shape,
    masked,
    no_tokens,
    on_the_gpu,
    some_lists,
    very_negative_scores,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by
from turbo_opt.kernels import OperatorInputError, block_sparse_attention, choose, explain

NAME = "block_sparse_attention"


@each_case
@each_shape
def test_values_are_those_of_dense_attention_with_a_mask(
    provider, dtype, largest_error, batch, heads, length, blocks, kept, head_dim, device
):
    q, k, v = heads_of_one_product(batch, heads, length, dtype, device, head_dim)
    lists = some_lists(batch, heads, length, *blocks, kept, device)
    o, _ = run_by(provider, NAME, q, k, v, lists, *blocks)
    assert o.dtype is dtype
    assert relative_error(masked(q, k, v, lists, *blocks), o) < largest_error


@each_case
def test_the_logarithm_of_the_normalizer(provider, dtype, largest_error, device):
    q, k, v = heads_of_one_product(1, 2, 130, dtype, device, 32)
    lists = some_lists(1, 2, 130, 64, 64, 3, device)
    _, log_sum = run_by(provider, "block_sparse_attention", q, k, v, lists, 64, 64)
    expected = (q.double() @ k.double().mT / math.sqrt(32)).logsumexp(-1)
    assert relative_error(expected, log_sum) < largest_error


@each_case
def test_very_negative_scores_leave_no_nan(provider, dtype, largest_error, device):
    inputs, lists = very_negative_scores(dtype, device)
    results = run_by(provider, NAME, *inputs, lists, 64, 64)
    assert all(x.isfinite().all() for x in results)


def test_opcheck(device):
    q, k, v = torch.randn(3, 1, 2, 70, 32, device=device)
    assert_opcheck(NAME, q, k, v, some_lists(1, 2, 70, 64, 64, 1, device), 64, 64)


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 70, 16), (1, 2, 0, 16)])
def test_no_tokens_give_no_tokens(provider, shape, device):
    q, lists = no_tokens(shape, device)
    o, log_sum = run_by(provider, NAME, q, q, q, lists, 64, 64)
    assert o.shape == shape and log_sum.shape == shape[:3]


def arguments(dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    lists = torch.empty(1, 2, 3, 2, dtype=torch.int32, device="meta")
    named = {**heads_on_meta(dtype, head_dim), "lists": lists, "block_q": 128, "block_k": 64}
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "provider"), [("sm80", "triton"), ("sm90", "triton"), ("sm75", "reference")]
)
def test_choice_on_described_devices(device_name, provider):
    assert choose("block_sparse_attention", device_name, *arguments()) == provider


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": torch.float64}, "sums are kept in float32"), ({"head_dim": 96}, "got 96")],
)
def test_what_triton_does_not_serve_is_explained(changes, reason):
    choice = explain("block_sparse_attention", "sm90", *arguments(**changes))
    assert choice.provider == "reference" and reason in choice.passed_over["triton"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.ones(1, 2, 300, 128).half()}, "must share .* torch.float16"),
        ({"v": torch.ones(1, 2, 299, 128).bfloat16()}, r"\(1, 2, 299, 128\)"),
        ({"q": torch.ones(2, 300, 128).bfloat16()}, r"must be \(B, H, L, D\) alike"),
        ({"block_q": 32}, "block_q must be 64 or 128, got 32"),
        ({"lists": torch.ones(1, 2, 3, 2)}, "lists must be int32 .* got torch.float32"),
        ({"lists": torch.ones(1, 2, 5, 2).int()}, r"\(1, 2, 3, 1 … 5\), got .*\(1, 2, 5, 2\)"),
        ({"lists": torch.ones(1, 2, 3, 6).int()}, r"\(1, 2, 3, 1 … 5\), got .*\(1, 2, 3, 6\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^block_sparse_attention: .*{message}"):
        block_sparse_attention(*arguments(**changes))


@on_the_gpu
def test_16_bits_on_the_gpu(batch, length, heads, kept, dtype, blocks, device):
    inputs = heads_of_one_product(batch, heads, length, dtype, device)
    args = (*inputs, some_lists(batch, heads, length, *blocks, kept, device), *blocks)
    expected, actual = run_by("reference", NAME, *args), run_by("triton", NAME, *args)
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(theirs, mine) < LARGEST_ERROR[dtype]
