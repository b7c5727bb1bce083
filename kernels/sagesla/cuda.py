"""sagesla whose attention kernel is written in CUDA for Hopper; the rest is Triton's."""

from __future__ import annotations

import functools

from . import triton

sagesla = functools.partial(triton.sagesla, cuda=True)
