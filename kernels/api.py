"""Everything that `turbo_opt.kernels` offers, in one place."""

from __future__ import annotations

from .adaln import adaln
from .adaln_quantize import adaln_quantize
from .attention_jvp import attention_jvp
from .block_linear import block_linear
from .block_quantize import (
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)
from .block_routing import block_routing
from .block_sparse_attention import block_sparse_attention
from .block_sparse_attention_backward import block_sparse_attention_backward
from .capability import Capability, capability_of, parse_capability
from .errors import KernelError, OperatorInputError, ProviderError
from .gated_residual import gated_residual
from .gelu_quantize import gelu_quantize
from .layer_norm import layer_norm
from .layer_norm_quantize import layer_norm_quantize
from .linear_gated_residual import linear_gated_residual
from .linear_gelu_quantize import linear_gelu_quantize
from .norm_rope import norm_rope
from .norm_rope_sagesla import norm_rope_sagesla
from .norm_rope_sagesla_quantize import norm_rope_sagesla_quantize
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
    read_provider_tables,
    recorded_choices,
)
from .padded_attention import padded_attention
from .padded_attention_quantize import padded_attention_quantize
from .residual_adaln_quantize import residual_adaln_quantize
from .residual_layer_norm_quantize import residual_layer_norm_quantize
from .rms_norm import rms_norm
from .sage_attention import sage_attention
from .sage_sparse_attention import sage_sparse_attention
from .sagesla import sagesla
from .schemes import SCHEMES, Scheme
from .sla import sla
from .sla2 import sla2

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
    "attention_jvp",
    "block_linear",
    "block_routing",
    "block_sparse_attention",
    "block_sparse_attention_backward",
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
    "linear_gated_residual",
    "linear_gelu_quantize",
    "norm_rope",
    "norm_rope_sagesla",
    "norm_rope_sagesla_quantize",
    "operator",
    "operators",
    "padded_attention",
    "padded_attention_quantize",
    "parse_capability",
    "quantize_activation",
    "quantize_weight",
    "read_provider_tables",
    "recorded_choices",
    "residual_adaln_quantize",
    "residual_layer_norm_quantize",
    "rms_norm",
    "sage_attention",
    "sage_sparse_attention",
    "sagesla",
    "sla",
    "sla2",
]
