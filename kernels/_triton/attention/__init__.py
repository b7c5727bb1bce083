"""Sparse-linear attention in Triton: q, k and v are prepared, blocks chosen, then attended to."""
