"""The definition of block_sparse_attention_backward, in float32 (float64 for float64)."""

from __future__ import annotations

from typing import Any

import torch

from ..block_sparse_attention.reference import attended_blocks, computing_dtype
from ..sla.reference import split_blocks
from ..sparse_rules import empty_heads
from . import BackwardArguments


def block_sparse_attention_backward(
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_o, q, k, v, o, log_sum, lists, block_q, block_k = BackwardArguments(*arguments)
    grads = (empty_heads(q), empty_heads(q), empty_heads(q))
    if q.numel() == 0:
        return grads
    dtype, scale = computing_dtype(q), q.shape[-1] ** -0.5
    q_exact, k_exact, v_exact = (x.to(dtype) for x in (q, k, v))
    do_blocks = split_blocks(grad_o.to(dtype), block_q)
    delta_blocks = (do_blocks * split_blocks(o.to(dtype), block_q)).sum(-1, keepdim=True)
    # Scores of tokens that do not exist are exp(s − ∞) = 0.
    missing = -q.shape[2] % block_q
    padded = torch.nn.functional.pad(log_sum.to(dtype), (0, missing), value=torch.inf)
    log_sum_blocks = padded.unflatten(2, (-1, block_q))[..., None]
    dq_blocks = torch.empty_like(do_blocks)
    dk_blocks, dv_blocks = (torch.zeros_like(split_blocks(x, block_k)) for x in (k_exact, v_exact))
    for part in attended_blocks(q_exact, k_exact, v_exact, lists, block_q, block_k):
        do = do_blocks[:, :, part.some]
        p = (part.s - log_sum_blocks[:, :, part.some]).exp()
        ds = p * (do @ part.v.mT - delta_blocks[:, :, part.some]) * scale
        dq_blocks[:, :, part.some] = ds @ part.k
        chosen = lists[:, :, part.some]
        _add_to_blocks(dk_blocks, ds.mT @ part.q, chosen)
        _add_to_blocks(dv_blocks, p.mT @ do, chosen)
    for grad, blocks in zip(grads, (dq_blocks, dk_blocks, dv_blocks), strict=True):
        grad.copy_(blocks.flatten(2, 3)[:, :, : q.shape[2]])
    return grads


def _add_to_blocks(
    total_BHNSD: torch.Tensor, part_BHQMD: torch.Tensor, chosen_BHQJ: torch.Tensor
) -> None:
    """Add what each query block Q gives to the J blocks of its list, M = J·S tokens."""
    batch, heads, _, block, head_dim = total_BHNSD.shape
    part = part_BHQMD.reshape(batch, heads, -1, block, head_dim)
    index = chosen_BHQJ.long().reshape(batch, heads, -1, 1, 1).expand_as(part)
    total_BHNSD.scatter_add_(2, index, part)
