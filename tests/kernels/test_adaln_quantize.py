"""adaln_quantize(x) = quantize_activation(adaln(x)), without rounding in between."""

from __future__ import annotations

import pytest

from tests.kernels.quantized_norms import ADALN, QuantizedNormTests


class TestAdalnQuantize(QuantizedNormTests):
    name = "adaln_quantize"
    norm = ADALN

    @pytest.fixture(params=["shared", "per batch", "per token"])
    def kind(self, request):
        return request.param
