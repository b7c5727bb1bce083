"""layer_norm_quantize(x) = quantize_activation(layer_norm(x)), without rounding in between."""

from __future__ import annotations

import pytest

from tests.kernels.quantized_norms import LAYER_NORM, QuantizedNormTests


class TestLayerNormQuantize(QuantizedNormTests):
    name = "layer_norm_quantize"
    norm = LAYER_NORM

    @pytest.fixture(params=["none", "weight", "both"])
    def kind(self, request):
        return request.param
