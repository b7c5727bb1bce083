"""sage_sparse_attention by CUDA kernels for Hopper; Triton's sum over parts."""

from __future__ import annotations

import functools

from . import triton

sage_sparse_attention = functools.partial(triton.sage_sparse_attention, cuda=True)
