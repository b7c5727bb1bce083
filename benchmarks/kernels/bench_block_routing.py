"""block_routing at the models' shapes: milliseconds, beside torch.topk and a sort."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session, provider
from turbo_opt.kernels.sparse_rules import block_count, kept_blocks

TOPK, BLOCK_Q, BLOCK_K, HEAD_DIM = 0.1, 64, 128, 128


def sorted_topk(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> torch.Tensor:
    """The definition, as torch's own operators."""
    with provider("block_routing", "reference") as call:
        return call(q_means, k_means, keep)


def bench(session: Session) -> None:
    for heads, tokens in session.attention:

        def make(heads: int = heads, tokens: int = tokens) -> InputSet:
            queries, keys = block_count(tokens, BLOCK_Q), block_count(tokens, BLOCK_K)
            q_means = torch.randn(1, heads, queries, HEAD_DIM, device=session.device)
            k_means = torch.randn(1, heads, keys, HEAD_DIM, device=session.device)
            return q_means, k_means, kept_blocks(TOPK, tokens, BLOCK_K)

        sets = session.input_sets(make)
        _, names = session.usable("block_routing", sets[0])
        baseline = {"torch_topk": session.time(sorted_topk, sets)}
        for each in names:
            with provider("block_routing", each) as call:
                timing = session.time(call, sets)
                share = _share_kept(call(*sets[0]), sets[0])
            shape = f"{heads}x{tokens}"
            if not share >= 0.9999:
                session.failures.append(f"block_routing/{shape}/{each}: {share:.4f} kept alike")
            session.record_time(
                f"block_routing/{each}/{shape}",
                timing,
                baseline,
                quality={"share_of_blocks_as_reference": share},
                config={"provider": each, "keep": sets[0][2]},
            )


def _share_kept(lists: torch.Tensor, args: InputSet) -> float:
    """How many blocks of the lists the reference keeps too; near ties may differ."""
    expected = sorted_topk(*args)
    q_means, k_means, _ = args
    shape = (*q_means.shape[:3], k_means.shape[2])
    kept = torch.zeros(shape, dtype=torch.bool, device=lists.device).scatter(
        -1, expected.long(), True
    )
    return kept.gather(-1, lists.long()).float().mean().item()
