"""padded_attention_quantize by padded_attention.cu."""

from __future__ import annotations

import functools

from .._cuda.padded_attention import attend_to_padded
from . import quantized_by

padded_attention_quantize = functools.partial(quantized_by, attend_to_padded)
