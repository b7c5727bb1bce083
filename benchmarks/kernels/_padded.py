"""What the benchmarks of attention to a padded prompt share: prompts, bounds and baselines."""

from __future__ import annotations

import torch

from benchmarks.kernels._harness import InputSet, Session
from benchmarks.kernels._sparse import HEAD_DIM, heads_of_one_product
from benchmarks.results import Ceiling
from turbo_opt.kernels.sparse_rules import as_heads

PROMPT = 512
WORDS = [120, 200, 511]  # tokens of the prompt itself; one more stands for the padding


def prompts(session: Session) -> list[tuple[int, int]]:
    """(positions, tokens of the prompt itself)."""
    return [(70, 40)] if session.dry else [(PROMPT, words) for words in WORDS]


def operands(session: Session, heads: int, tokens: int, positions: int, words: int) -> InputSet:
    """q of a clip, k and v of a padded prompt, and where the padding starts."""
    q, _, _ = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
    _, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, positions))
    for x in (k, v):
        x[:, :, words:] = x[:, :, words : words + 1].clone()
    start = torch.full((1,), words, dtype=torch.int32, device=session.device)
    return q, k, v, start, None


def floor(session: Session, heads: int, tokens: int, words: int, written: int) -> Ceiling:
    """The longer of its products on the keys that differ and of reading q and writing the result.

    Args:
        written: bytes of a channel of the result.
    """
    values = heads * tokens * HEAD_DIM
    products = 4 * values * (words + 1) / session.bf16_matmul.value / 1e9
    traffic = values * (2 + written) / session.copy.value / 1e6
    if products > traffic:
        return Ceiling(products, "ms", f"its products at {session.bf16_matmul.what}")
    return Ceiling(traffic, "ms", f"its reads and writes at {session.copy.what}")
