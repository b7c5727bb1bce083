"""residual_layer_norm_quantize: x' = x + y · gate, and layer_norm(x') quantized."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.quantized_norms import LAYER_NORM, ResidualQuantizedNormTests
from turbo_opt.kernels import OperatorInputError, residual_layer_norm_quantize

# Of the gate and of the norm's parameters.
KINDS = [
    ("none", "both"),
    ("shared", "none"),
    ("per batch", "weight"),
    ("per token", "both"),
]


class TestResidualLayerNormQuantize(ResidualQuantizedNormTests):
    name = "residual_layer_norm_quantize"
    norm = LAYER_NORM

    @pytest.fixture(params=KINDS, ids=" and ".join)
    def kinds(self, request):
        return request.param

    def test_wrong_arguments_are_named(self):
        x = torch.randn(1, 4, 256)
        first, second = self.norm.usual(x)
        for arguments, message in (
            ((x, x[:, :3], None, first, second), f"^{self.name}: y must be torch.float32 of shape"),
            (
                (x, x, first[..., :9][None, None], first, second),
                f"^{self.name}: gate must have shape",
            ),
            ((x, x, None, first[..., :9], second), "weight must have shape"),
            ((x, x, None, first, second.half()), "bias must be float32 or torch.float32"),
            ((x[..., :200], x[..., :200], None, first[..., :200], second[..., :200]), "got 200"),
            ((x, x, None, first, second, 1e-6, "fp8-blok"), "did you mean 'fp8-block'"),
        ):
            with pytest.raises(OperatorInputError, match=message):
                residual_layer_norm_quantize(*arguments)
