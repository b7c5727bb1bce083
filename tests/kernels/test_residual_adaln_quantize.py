"""residual_adaln_quantize: x' = x + y · gate, and adaln(x') quantized."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.quantized_norms import ADALN, ResidualQuantizedNormTests
from turbo_opt.kernels import OperatorInputError, residual_adaln_quantize

# Of the gate and of the norm's parameters.
KINDS = [
    ("none", "per token"),
    ("shared", "shared"),
    ("per batch", "per token"),
    ("per token", "per batch"),
]


class TestResidualAdalnQuantize(ResidualQuantizedNormTests):
    name = "residual_adaln_quantize"
    norm = ADALN

    @pytest.fixture(params=KINDS, ids=" and ".join)
    def kinds(self, request):
        return request.param

    def test_wrong_arguments_are_named(self):
        x = torch.randn(1, 4, 256)
        first, second = self.norm.usual(x)
        for arguments, message in (
            ((x, x[:, :3], None, first, second), f"^{self.name}: y must be torch.float32 of shape"),
            ((x, x, first[..., :9], first, second), f"^{self.name}: gate must have shape"),
            ((x, x, None, first[..., :9], second), "scale must have shape"),
            ((x, x, None, first, second.half()), "shift must be float32 or torch.float32"),
            ((x[..., :200], x[..., :200], None, first[..., :200], second[..., :200]), "got 200"),
            ((x, x, None, first, second, 1e-6, "fp8-blok"), "did you mean 'fp8-block'"),
        ):
            with pytest.raises(OperatorInputError, match=message):
                residual_adaln_quantize(*arguments)
