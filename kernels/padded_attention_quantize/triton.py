"""padded_attention_quantize in one pass: a program holds the heads that it quantizes."""

from __future__ import annotations

import functools

from .._triton.attention.padded import attend_to_padded
from . import quantized_by

padded_attention_quantize = functools.partial(quantized_by, attend_to_padded)
