"""norm_rope_sagesla by CUDA kernels for Hopper; Triton's choose blocks and sum over parts."""

from __future__ import annotations

import functools

from . import triton

norm_rope_sagesla = functools.partial(triton.norm_rope_sagesla, cuda=True)
