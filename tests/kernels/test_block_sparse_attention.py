"""block_sparse_attention(q, k, v, lists) and its derivative, against dense masked attention."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention_checks import BLOCKS, heads_of_one_product, masked_attention
from tests.kernels.kernel_checks import assert_opcheck, relative_error, run_by
from turbo_opt.kernels import (
    KernelError,
    OperatorInputError,
    block_sparse_attention,
    choose,
    explain,
    force_provider,
)
from turbo_opt.kernels.block_sparse_attention_backward.transpose import transpose_lists

OPERATORS = ("block_sparse_attention", "block_sparse_attention_backward")
# Triton's interpreter multiplies bfloat16 wrongly, so float16 stands for 16 bits on a CPU.
CASES = [
    ("reference", torch.float64, 1e-12),
    ("reference", torch.float32, 1e-5),
    ("triton", torch.float32, 1e-5),
    ("triton", torch.float16, 2e-3),
]
each_case = pytest.mark.parametrize(
    ("provider", "dtype", "largest_error"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)


def some_lists(batch, heads, length, block_q, block_k, kept, device="cpu"):
    """Different key blocks for each query block, at random, in ascending order."""
    queries, keys = math.ceil(length / block_q), math.ceil(length / block_k)
    scores = torch.rand(batch, heads, queries, keys, device=device)
    return scores.topk(min(kept, keys), -1).indices.sort(-1).values.to(torch.int32)


def masked(q, k, v, lists, block_q, block_k):
    """Dense attention in float64, all but the listed blocks hidden; differentiable."""
    keys = math.ceil(q.shape[2] / block_k)
    kept = torch.zeros(*lists.shape[:3], keys, dtype=torch.bool, device=q.device)
    return masked_attention(q, k, v, kept.scatter(-1, lists.long(), True), block_q, block_k)


def gradients(provider, inputs, lists, blocks, grad_o):
    """o and the gradients of q, k and v, by autograd through the operators of one provider."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with force_provider(dict.fromkeys(OPERATORS, provider)):
        o, _ = block_sparse_attention(*leaves, lists, *blocks)
        o.backward(grad_o)
    return o, *(x.grad for x in leaves)


@each_case
@pytest.mark.parametrize(
    ("batch", "heads", "length", "blocks", "kept", "head_dim"),
    [
        (1, 1, 1, (64, 128), 1, 16),
        (1, 2, 129, (64, 128), 1, 32),  # the last key block holds one token
        (2, 1, 200, (128, 64), 2, 64),
        (1, 1, 257, (128, 64), 3, 128),  # the last blocks of both hold one token
        (1, 1, 150, (128, 128), 2, 16),  # every block
    ],
)
def test_values_and_gradients_are_those_of_dense_attention_with_a_mask(
    provider, dtype, largest_error, batch, heads, length, blocks, kept, head_dim, device
):
    inputs = heads_of_one_product(batch, heads, length, dtype, device, head_dim)
    lists = some_lists(batch, heads, length, *blocks, kept, device)
    grad_o = torch.randn_like(inputs[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = masked(*exact, lists, *blocks)
    expected.backward(grad_o.double())
    o, *grads = gradients(provider, inputs, lists, blocks, grad_o)
    assert relative_error(expected, o) < largest_error
    for mine, leaf in zip(grads, exact, strict=True):
        error = (mine.double() - leaf.grad).norm() / exact[2].grad.norm()
        assert mine.dtype is dtype and error < largest_error


def test_gradcheck_in_float64():
    q, k, v = torch.randn(3, 1, 1, 70, 4, dtype=torch.float64)
    lists = torch.tensor([[[[1], [0]]]], dtype=torch.int32)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *heads: block_sparse_attention(*heads, lists, 64, 64)[0], leaves
    )


@each_case
def test_the_logarithm_of_the_normalizer(provider, dtype, largest_error, device):
    q, k, v = heads_of_one_product(1, 2, 130, dtype, device, 32)
    lists = some_lists(1, 2, 130, 64, 64, 3, device)
    _, log_sum = run_by(provider, "block_sparse_attention", q, k, v, lists, 64, 64)
    expected = (q.double() @ k.double().mT / math.sqrt(32)).logsumexp(-1)
    assert relative_error(expected, log_sum) < largest_error


@each_case
def test_a_key_block_that_nobody_keeps_has_zero_gradients(provider, dtype, largest_error, device):
    inputs = heads_of_one_product(1, 1, 192, dtype, device, 16)
    lists = torch.tensor([[[[0, 2], [0, 2], [0, 2]]]], dtype=torch.int32, device=device)
    _, dq, dk, dv = gradients(provider, inputs, lists, (64, 64), torch.ones_like(inputs[0]))
    assert not dk[:, :, 64:128].any() and not dv[:, :, 64:128].any()
    assert dq.any() and dk[:, :, 128:].any() and dv[:, :, :64].any()


@each_case
def test_very_negative_scores_leave_no_nan(provider, dtype, largest_error, device):
    q = torch.full((1, 1, 70, 16), 30.0, device=device, dtype=dtype)
    inputs = (q, -q, torch.randn_like(q))
    lists = some_lists(1, 1, 70, 64, 64, 2, device)
    o, *grads = gradients(provider, inputs, lists, (64, 64), torch.ones_like(q))
    assert all(x.isfinite().all() for x in (o, *grads))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 2**31),
)
def test_transposed_lists_name_every_query_block_that_keeps_a_key_block(
    batch, heads, queries, keys, share, seed
):
    torch.manual_seed(seed)
    kept = max(1, int(share * keys))
    lists = torch.rand(batch, heads, queries, keys).topk(kept, -1).indices.to(torch.int32)
    starts, query_blocks = transpose_lists(lists, keys)
    rows = [query_blocks[a:b].tolist() for a, b in itertools.pairwise(starts)]
    expected = [
        [i for i in range(queries) if key in head[i]]
        for head in lists.flatten(0, 1).tolist()
        for key in range(keys)
    ]
    assert rows == expected


def test_the_derivative_has_no_derivative():
    q, k, v = torch.randn(3, 1, 1, 64, 4, dtype=torch.float64)
    q.requires_grad_()
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    o, log_sum = block_sparse_attention(q, k, v, lists, 64, 64)
    assert not log_sum.requires_grad
    (grad,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(KernelError, match="can be derived once"):
        grad.sum().backward()


def test_opcheck(device):
    q, k, v, grad_o = torch.randn(4, 1, 2, 70, 32, device=device, dtype=torch.float32)
    lists = some_lists(1, 2, 70, 64, 64, 1, device)
    assert_opcheck("block_sparse_attention", q, k, v, lists, 64, 64)
    o, log_sum = block_sparse_attention(q, k, v, lists, 64, 64)
    args = (grad_o, q, k, v, o, log_sum, lists, 64, 64)
    assert_opcheck("block_sparse_attention_backward", *args)


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 70, 16), (1, 2, 0, 16)])
def test_no_tokens_give_no_tokens(provider, shape, device):
    q = torch.randn(shape, device=device)
    lists = torch.zeros(shape[0], 2, math.ceil(shape[2] / 64), 1, dtype=torch.int32, device=device)
    o, *grads = gradients(provider, (q, q, q), lists, (64, 64), torch.ones_like(q))
    assert all(x.shape == shape for x in (o, *grads))


def arguments(dtype=torch.bfloat16, head_dim=128, **changes):
    """Arguments of a valid call, in order, with changes; tensors on meta."""
    q = torch.empty(1, 2, 300, head_dim, dtype=dtype, device="meta")
    lists = torch.empty(1, 2, 3, 2, dtype=torch.int32, device="meta")
    named = {"q": q, "k": q, "v": q, "lists": lists, "block_q": 128, "block_k": 64}
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


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("batch", "length", "heads", "kept"), [(1, 2000, 2, 4), (2, 777, 3, 3)])
def test_16_bits_on_the_gpu(batch, length, heads, kept, dtype, blocks, device):
    inputs = heads_of_one_product(batch, heads, length, dtype, device)
    lists = some_lists(batch, heads, length, *blocks, kept, device)
    grad_o = torch.randn_like(inputs[0])
    expected = gradients("reference", inputs, lists, blocks, grad_o)
    actual = gradients("triton", inputs, lists, blocks, grad_o)
    largest = {torch.bfloat16: 0.02, torch.float16: 3e-3, torch.float32: 1e-4}[dtype]
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(theirs, mine) < largest
