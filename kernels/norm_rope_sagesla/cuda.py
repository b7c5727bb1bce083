"""norm_rope_sagesla whose attention kernel is written in CUDA for Hopper; the rest is Triton's."""

from __future__ import annotations

import functools

from . import triton

norm_rope_sagesla = functools.partial(triton.norm_rope_sagesla, cuda=True)
