"""sagesla by CUDA kernels for Hopper; Triton's choose blocks and sum over parts."""

from __future__ import annotations

import functools

from . import triton

sagesla = functools.partial(triton.sagesla, cuda=True)
