"""The definition of block_routing, in float32."""

from __future__ import annotations

import torch


def block_routing(q_means: torch.Tensor, k_means: torch.Tensor, keep: int) -> torch.Tensor:
    scores = q_means @ k_means.transpose(-1, -2)
    return scores.topk(keep, dim=-1).indices.sort(-1).values.to(torch.int32)
