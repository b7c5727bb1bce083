"""sage_sparse_attention(q, k, v, lists): the sparse branch of sagesla with the routing left out."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_checks import (
    BLOCKS,
    assert_attends,
    heads_of_one_product,
    with_8_bit_operands,
)
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by
from turbo_opt.kernels import (
    OperatorInputError,
    block_sparse_attention,
    choose,
    explain,
    sage_sparse_attention,
    sagesla,
)
from turbo_opt.kernels.sla.reference import route

NAME = "sage_sparse_attention"


def some_lists(batch, heads, length, blocks, kept, device="cpu"):
    queries, keys = (-(-length // block) for block in blocks)
    scores = torch.rand(batch, heads, queries, keys, device=device)
    return scores.topk(min(kept, keys), -1).indices.sort(-1).values.to(torch.int32)


@pytest.mark.parametrize("pv", ["fp8", "16bit"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_with_the_lists_of_sagesla_it_is_its_sparse_branch(blocks, pv):
    q, k, v = heads_of_one_product(2, 2, 300, torch.float32, "cpu")
    lists = route(q, k, 0.5, *blocks)
    expected = sagesla(q, k, v, None, None, 0.5, *blocks, "softmax", pv)
    assert torch.equal(sage_sparse_attention(q, k, v, lists, *blocks, pv), expected)


def test_it_equals_integers_and_e4m3_codes_query_by_query():
    q, k, v = heads_of_one_product(1, 2, 150, torch.float32, "cpu", head_dim=32)
    lists = some_lists(1, 2, 150, (64, 64), 2)
    o = sage_sparse_attention(q, k, v, lists, 64, 64, "fp8")
    for head in range(2):
        kept = torch.zeros(3, 3, dtype=torch.bool).scatter(1, lists[0, head].long(), True)
        expected = with_8_bit_operands(q[0, head], k[0, head], v[0, head], kept, 64, 64)
        assert relative_error(expected, o[0, head]) < 0.01


@pytest.mark.parametrize(("pv", "largest_error"), [("16bit", 3e-3), ("fp8", 0.15)])
@pytest.mark.parametrize(
    ("batch", "heads", "length", "blocks", "kept"),
    [(1, 1, 1, (64, 128), 1), (1, 2, 129, (64, 128), 1), (2, 1, 257, (128, 64), 3)],
)
def test_triton_equals_the_reference(pv, largest_error, batch, heads, length, blocks, kept, device):
    """Triton's interpreter truncates to fp8, hence the wide bound there."""
    q, k, v = heads_of_one_product(batch, heads, length, torch.float16, device)
    args = (q, k, v, some_lists(batch, heads, length, blocks, kept, device), *blocks, pv)
    assert_attends(run_by("reference", NAME, *args), "triton", NAME, args, largest_error)


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [1, 4, 8, 30, 200])
def test_cuda_equals_the_reference_at_scores_of_any_size(magnitude, device):
    """Those of 8 and more have integer sums whose steps are too large for its usual exponents."""
    q, k, v = heads_of_one_product(1, 2, 700, torch.bfloat16, device)
    lists = some_lists(1, 2, 700, (64, 128), 4, device)
    args = (magnitude * q, magnitude * k, v, lists, 64, 128, "fp8")
    assert_attends(run_by("reference", NAME, *args), "cuda", NAME, args, 0.05)


def test_eight_bits_stay_close_to_sixteen():
    q, k, v = heads_of_one_product(1, 2, 300, torch.float32, "cpu")
    lists = some_lists(1, 2, 300, (64, 64), 3)
    exact, _ = block_sparse_attention(q, k, v, lists, 64, 64)
    for pv, largest_error in (("16bit", 0.02), ("fp8", 0.05)):
        error = relative_error(exact, sage_sparse_attention(q, k, v, lists, 64, 64, pv))
        assert 1e-4 < error < largest_error


@pytest.mark.parametrize("provider", ["reference", "triton"])
def test_no_tokens_give_no_tokens(provider, device):
    q = torch.randn(1, 2, 0, 128, device=device, dtype=torch.float16)
    lists = torch.zeros(1, 2, 0, 0, dtype=torch.int32, device=device)
    assert run_by(provider, NAME, q, q, q, lists, 64, 64, "16bit").shape == q.shape


def test_opcheck(device):
    q, k, v = torch.randn(3, 1, 1, 30, 128, device=device, dtype=torch.float16)
    assert_opcheck(NAME, q, k, v, some_lists(1, 1, 30, (64, 64), 1, device), 64, 64, "16bit")


def arguments(**changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    q = torch.empty(1, 2, 300, 128, dtype=torch.bfloat16, device="meta")
    lists = torch.empty(1, 2, 5, 2, dtype=torch.int32, device="meta")
    named = {"q": q, "k": q, "v": q, "lists": lists, "block_q": 64, "block_k": 128, "pv": "fp8"}
    return tuple({**named, **changes}.values())


@pytest.mark.parametrize(
    ("device_name", "changes", "provider"),
    [
        ("sm90", {}, "cuda"),
        ("sm90", {"pv": "16bit"}, "triton"),
        ("sm89", {}, "triton"),
        ("sm80", {}, "reference"),
        ("sm80", {"pv": "16bit"}, "triton"),
        ("cpu", {}, "reference"),
    ],
)
def test_choice_on_described_devices(device_name, changes, provider):
    assert choose(NAME, device_name, *arguments(**changes)) == provider


def test_what_triton_does_not_serve_is_explained():
    q = torch.empty(1, 2, 300, 64, dtype=torch.bfloat16, device="meta")
    choice = explain(NAME, "sm90", *arguments(q=q, k=q, v=q))
    assert choice.provider == "reference"
    assert "head dimension of 64" in choice.passed_over["triton"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pv": "int4"}, "pv must be 'fp8' or '16bit', got 'int4'"),
        ({"block_k": 32}, "block_k must be 64 or 128, got 32"),
        ({"lists": torch.ones(1, 2, 4, 2, dtype=torch.int32)}, r"of shape \(1, 2, 5, 1 … 3\)"),
        ({"k": torch.ones(1, 2, 300, 128).half()}, "must share bfloat16, float16 or float32"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^{NAME}: .*{message}"):
        sage_sparse_attention(*arguments(**changes))


@pytest.mark.gpu
@pytest.mark.parametrize("pv", ["fp8", "16bit"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("batch", "length", "heads", "kept"), [(1, 2000, 2, 4), (2, 777, 3, 2)])
def test_bfloat16_on_the_gpu(batch, length, heads, kept, blocks, pv, device):
    q, k, v = heads_of_one_product(batch, heads, length, torch.bfloat16, device)
    args = (q, k, v, some_lists(batch, heads, length, blocks, kept, device), *blocks, pv)
    expected = run_by("reference", NAME, *args)
    choice = explain(NAME, device, *args)
    for provider in choice.serving[:-1]:
        assert_attends(expected, provider, NAME, args, 0.03)
