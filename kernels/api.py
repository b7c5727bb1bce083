"""Everything that `turbo_opt.kernels` offers, in one place."""

from __future__ import annotations

from .adaln import adaln
from .adaln_quantize import adaln_quantize
from .block_linear import block_linear
from .block_quantize import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from .capability import Capability, capability_of, parse_capability
from .errors import KernelError, OperatorInputError, ProviderError
from .layer_norm import layer_norm
from .layer_norm_quantize import layer_norm_quantize
from .operator import (
    Choice,
    Operator,
    Provider,
    choose,
    clear_recorded_choices,
    explain,
    force_provider,
    operator,
    operators,
    recorded_choices,
)
from .rms_norm import rms_norm
from .schemes import SCHEMES, Scheme

__all__ = [
    "SCHEMES",
    "Capability",
    "Choice",
    "KernelError",
    "Operator",
    "OperatorInputError",
    "Provider",
    "ProviderError",
    "Scheme",
    "adaln",
    "adaln_quantize",
    "block_linear",
    "capability_of",
    "choose",
    "clear_recorded_choices",
    "dequantize_activation",
    "dequantize_weight",
    "explain",
    "force_provider",
    "layer_norm",
    "layer_norm_quantize",
    "operator",
    "operators",
    "parse_capability",
    "quantize_activation",
    "quantize_weight",
    "recorded_choices",
    "rms_norm",
]
