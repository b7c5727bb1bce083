"""The derivative of block_sparse_attention, against autograd through dense masked attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention_checks import heads_of_one_product
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
from tests.kernels.kernel_checks import assert_opcheck, relative_error
from turbo_opt.kernels import (
    KernelError,
    OperatorInputError,
    block_sparse_attention,
    block_sparse_attention_backward,
    force_provider,
)
from turbo_opt.kernels.block_sparse_attention_backward.transpose import transpose_lists

NAME = "block_sparse_attention_backward"


def gradients(provider, inputs, lists, blocks, grad_o):
    """The gradients of q, k and v, by autograd through the operators of one provider."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with force_provider({"block_sparse_attention": provider, NAME: provider}):
        o, _ = block_sparse_attention(*leaves, lists, *blocks)
        o.backward(grad_o)
    return tuple(x.grad for x in leaves)


def arguments(device="cpu", **changes):
    """Arguments of a valid call, in order, with changes."""
    q, k, v, grad_o = torch.randn(4, 1, 2, 70, 32, device=device)
    lists = some_lists(1, 2, 70, 64, 64, 1, device)
    o, log_sum = block_sparse_attention(q, k, v, lists, 64, 64)
    named = {"grad_o": grad_o, "q": q, "k": k, "v": v, "o": o, "log_sum": log_sum, "lists": lists}
    return (*{**named, **changes}.values(), 64, 64)


@each_case
@each_shape
def test_gradients_are_those_of_dense_attention_with_a_mask(
    provider, dtype, largest_error, batch, heads, length, blocks, kept, head_dim, device
):
    inputs = heads_of_one_product(batch, heads, length, dtype, device, head_dim)
    lists = some_lists(batch, heads, length, *blocks, kept, device)
    grad_o = torch.randn_like(inputs[0])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    masked(*exact, lists, *blocks).backward(grad_o.double())
    largest_gradient = exact[2].grad.norm()
    for mine, leaf in zip(gradients(provider, inputs, lists, blocks, grad_o), exact, strict=True):
        error = (mine.double() - leaf.grad).norm() / largest_gradient
        assert mine.dtype is dtype and error < largest_error


def test_gradcheck_in_float64():
    q, k, v = torch.randn(3, 1, 1, 70, 4, dtype=torch.float64)
    lists = torch.tensor([[[[1], [0]]]], dtype=torch.int32)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(
        lambda *heads: block_sparse_attention(*heads, lists, 64, 64)[0], leaves
    )


@each_case
def test_a_key_block_that_nobody_keeps_has_zero_gradients(provider, dtype, largest_error, device):
    inputs = heads_of_one_product(1, 1, 192, dtype, device, 16)
    lists = torch.tensor([[[[0, 2], [0, 2], [0, 2]]]], dtype=torch.int32, device=device)
    dq, dk, dv = gradients(provider, inputs, lists, (64, 64), torch.ones_like(inputs[0]))
    assert not dk[:, :, 64:128].any() and not dv[:, :, 64:128].any()
    assert dq.any() and dk[:, :, 128:].any() and dv[:, :, :64].any()


@each_case
def test_very_negative_scores_leave_no_nan(provider, dtype, largest_error, device):
    inputs, lists = very_negative_scores(dtype, device)
    found = gradients(provider, inputs, lists, (64, 64), torch.ones_like(inputs[0]))
    assert all(x.isfinite().all() for x in found)


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
    assert_opcheck(NAME, *arguments(device))


@pytest.mark.parametrize("provider", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(0, 2, 70, 16), (1, 2, 0, 16)])
def test_no_tokens_give_no_tokens(provider, shape, device):
    q, lists = no_tokens(shape, device)
    found = gradients(provider, (q, q, q), lists, (64, 64), torch.ones_like(q))
    assert all(x.shape == shape for x in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_o": torch.ones(1, 2, 70, 32).half()}, "must share .* torch.float16"),
        ({"o": torch.ones(1, 2, 69, 32)}, r"alike, got .*\(1, 2, 69, 32\)"),
        ({"log_sum": torch.ones(1, 2, 69)}, r"log_sum must be \(1, 2, 70\), got \(1, 2, 69\)"),
        ({"lists": torch.ones(1, 2, 3, 1).int()}, r"\(1, 2, 2, 1 … 2\), got .*\(1, 2, 3, 1\)"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(OperatorInputError, match=f"^{NAME}: .*{message}"):
        block_sparse_attention_backward(*arguments(**changes))


@on_the_gpu
def test_16_bits_on_the_gpu(batch, length, heads, kept, dtype, blocks, device):
    inputs = heads_of_one_product(batch, heads, length, dtype, device)
    lists = some_lists(batch, heads, length, *blocks, kept, device)
    grad_o = torch.randn_like(inputs[0])
    expected = gradients("reference", inputs, lists, blocks, grad_o)
    actual = gradients("triton", inputs, lists, blocks, grad_o)
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(theirs, mine) < LARGEST_ERROR[dtype]
