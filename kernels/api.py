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
from .block_routing import block_routing
from .capability import Capability, capability_of, parse_capability
from .errors import KernelError, OperatorInputError, ProviderError
from .gated_residual import gated_residual
from .gelu_quantize import gelu_quantize
from .layer_norm import layer_norm
from .layer_norm_quantize import layer_norm_quantize
from .norm_rope import norm_rope
from .norm_rope_sagesla import norm_rope_sagesla
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
from .residual_adaln_quantize import residual_adaln_quantize
from .residual_layer_norm_quantize import residual_layer_norm_quantize
from .rms_norm import rms_norm
from .sagesla import sagesla
from .schemes import SCHEMES, Scheme
from .sla import sla

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
    "block_routing",
    "capability_of",
    "choose",
    "clear_recorded_choices",
    "dequantize_activation",
    "dequantize_weight",
    "explain",
    "force_provider",
    "gated_residual",
    "gelu_quantize",
    "layer_norm",
    "layer_norm_quantize",
    "norm_rope",
    "norm_rope_sagesla",
    "operator",
    "operators",
    "parse_capability",
    "quantize_activation",
    "quantize_weight",
    "recorded_choices",
    "residual_adaln_quantize",
    "residual_layer_norm_quantize",
    "rms_norm",
    "sagesla",
    "sla",
]
