"""What the tests of block-sparse attention and of its derivative share."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.attention_checks import BLOCKS, masked_attention
from tests.kernels.kernel_checks import provider_cases

# Triton's interpreter multiplies bfloat16 wrongly, so float16 stands for 16 bits on a CPU.
each_case = provider_cases(
    ("reference", torch.float64, 1e-12),
    ("reference", torch.float32, 1e-5),
    ("triton", torch.float32, 1e-5),
    ("triton", torch.float16, 2e-3),
)
each_shape = pytest.mark.parametrize(
    ("batch", "heads", "length", "blocks", "kept", "head_dim"),
    [
        (1, 1, 1, (64, 128), 1, 16),
        (1, 2, 129, (64, 128), 1, 32),  # the last key block holds one token
        (2, 1, 200, (128, 64), 2, 64),
        (1, 1, 257, (128, 64), 3, 128),  # the last blocks of both hold one token
        (1, 1, 150, (128, 128), 2, 16),  # every block
    ],
)
LARGEST_ERROR = {torch.bfloat16: 0.02, torch.float16: 3e-3, torch.float32: 1e-4}


def on_the_gpu(test):
    """Every dtype and block size at lengths that no block divides."""
    marks = (
        pytest.mark.gpu,
        pytest.mark.parametrize("blocks", BLOCKS),
        pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=str),
        pytest.mark.parametrize(
            ("batch", "length", "heads", "kept"), [(1, 2000, 2, 4), (2, 777, 3, 3)]
        ),
    )
    for mark in marks:
        test = mark(test)
    return test


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


def very_negative_scores(dtype, device):
    """q, k and v of one head whose scores are all −3600, and lists of every block."""
    q = torch.full((1, 1, 70, 16), 30.0, device=device, dtype=dtype)
    return (q, -q, torch.randn_like(q)), some_lists(1, 1, 70, 64, 64, 2, device)


def no_tokens(shape, device):
    """Heads of that empty shape, (B, 2, L, D), and their lists."""
    blocks = math.ceil(shape[2] / 64)
    lists = torch.zeros(shape[0], 2, blocks, 1, dtype=torch.int32, device=device)
    return torch.randn(shape, device=device), lists
