"""block_routing keeps the highest entries of each row of q_means · k_meansᵀ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_checks import assert_opcheck, run_by
from turbo_opt.kernels import OperatorInputError, block_routing, choose, explain

PROVIDERS = ["reference", "triton"]


def means(batch, heads, queries, keys, device, head_dim=128):
    q = torch.randn(batch, heads, queries, head_dim, device=device)
    return q, torch.randn(batch, heads, keys, head_dim, device=device)


def scores_of(q, k):
    return torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double())


def assert_valid(lists, keys):
    """Ascending, so different, indices of key blocks."""
    assert lists.dtype is torch.int32
    assert (lists >= 0).all() and (lists < keys).all()
    assert (lists.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("queries", "keys", "keep"),
    [(1, 1, 1), (3, 16, 1), (5, 17, 16), (2, 130, 13), (4, 40, 40), (3, 700, 70)],
)
def test_lists_are_the_sets_that_topk_gives(provider, queries, keys, keep, device):
    q, k = means(2, 3, queries, keys, device)
    lists = run_by(provider, "block_routing", q, k, keep)
    assert lists.shape == (2, 3, queries, keep)
    assert_valid(lists, keys)
    assert torch.equal(lists.long(), scores_of(q, k).topk(keep).indices.sort(-1).values)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 20),
    keys=st.integers(1, 70),
    share=st.floats(0, 1),
    decimals=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_what_is_kept_scores_no_less_than_what_is_not(device, queries, keys, share, decimals, seed):
    """Few decimals make many equal scores, of which any may be kept."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.zeros(1, 2, queries, 128), torch.zeros(1, 2, keys, 128)
    q[..., 0] = 1.0
    k[..., 0] = torch.randn(1, 2, keys, generator=generator).round(decimals=decimals)
    q, k = q.to(device), k.to(device)
    keep = 1 + int(share * (keys - 1))
    scores = scores_of(q, k)
    for provider in PROVIDERS:
        lists = run_by(provider, "block_routing", q, k, keep)
        assert_valid(lists, keys)
        kept = scores.gather(-1, lists.long()).sort(-1, descending=True).values
        assert torch.equal(kept, scores.topk(keep).values)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_equal_scores_give_as_many_blocks_as_asked_for(provider, value, device):
    q = torch.full((1, 1, 3, 128), value, device=device)
    lists = run_by(provider, "block_routing", q, torch.ones(1, 1, 33, 128, device=device), 7)
    assert lists.shape == (1, 1, 3, 7)
    assert_valid(lists, 33)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("outlier", [1e30, float("inf"), float("nan")])
def test_outliers_leave_valid_lists(provider, outlier, device):
    q, k = means(1, 1, 4, 20, device)
    k[0, 0, 3] *= outlier
    q[0, 0, 1] *= 1e15
    assert_valid(run_by(provider, "block_routing", q, k, 5), 20)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_shift_of_all_keys_changes_no_list(provider, device):
    q, k = means(1, 2, 5, 30, device)
    shifted = k - k.mean(2, keepdim=True)
    lists = [run_by(provider, "block_routing", q, each, 6) for each in (k, shifted)]
    assert torch.equal(*lists)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_strided_means(provider, device):
    q, k = means(4, 2, 5, 30, device)
    q, k = q.transpose(0, 1)[:, 1:3], k.transpose(0, 1)[:, 1:3]
    expected = scores_of(q, k).topk(3).indices.sort(-1).values
    assert torch.equal(run_by(provider, "block_routing", q, k, 3).long(), expected)


def test_opcheck(device):
    assert_opcheck("block_routing", *means(2, 2, 3, 9, device), 4)


def test_choice_on_described_devices():
    q, k = means(1, 1, 2, 4, "meta")
    assert choose("block_routing", "sm90", q, k, 2) == "triton"
    assert choose("block_routing", "sm75", q, k, 2) == "reference"
    assert choose("block_routing", "cpu", q, k, 2) == "reference"
    many = explain("block_routing", "sm90", *means(1, 1, 2, 4097, "meta"), 2)
    assert many.provider == "reference" and "up to 4096 blocks" in many.passed_over["triton"]
    narrow = explain("block_routing", "sm90", *means(1, 1, 2, 4, "meta", 64), 2)
    assert narrow.provider == "reference" and "got 64" in narrow.passed_over["triton"]


@pytest.mark.parametrize(
    ("q", "k", "keep", "message"),
    [
        (torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4), 1, r"k_means \(B, H, NK, D\)"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5), 1, r"got \(1, 2, 3, 4\) and"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), 1, r"q_means must be \(B, H, NQ, D\)"),
        (torch.ones(1, 1, 3, 4).half(), torch.ones(1, 1, 3, 4), 1, "means must be float32"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0, "keep must be from 1 to 3, got 0"),
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 4, "keep must be from 1 to 3, got 4"),
    ],
)
def test_wrong_arguments_are_named(q, k, keep, message):
    with pytest.raises(OperatorInputError, match=message):
        block_routing(q, k, keep)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "keep"), [(12, 512, 256, 25), (40, 1182, 591, 59)]
)
def test_real_shapes(heads, queries, keys, keep, device):
    """Sums in another order swap blocks of almost equal score, nothing else."""
    q, k = means(1, heads, queries, keys, device)
    lists = run_by("triton", "block_routing", q, k, keep)
    assert_valid(lists, keys)
    scores = scores_of(q, k)
    kept = scores.gather(-1, lists.long()).sort(-1, descending=True).values
    torch.testing.assert_close(kept, scores.topk(keep).values, rtol=1e-4, atol=1e-4)
