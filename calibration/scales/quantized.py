"""A linear layer on quantized operands, its output in float32: what a scheme costs.

Plain torch around the quantization operators, in bands of rows: any device, any number of tokens.
Channels may be divided by powers of two first, which moves what a block's scale has to span and is
exact otherwise:  x·Wᵀ = (x / s)·(W·s)ᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turbo_opt.kernels import (
    SCHEMES,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)

BAND = 64 * 128
"""Tokens that are computed at once: whole blocks of every scheme."""


class Form(NamedTuple):
    """A linear layer as it may be quantized."""

    layer: str
    scheme: str
    divided: bool


def forms_of(name: str, layer: nn.Linear, divisors: Mapping[str, Tensor]) -> list[Form]:
    """Every scheme whose blocks fit the layer, with its channels as they are and, where `divisors`
    has the layer, divided."""
    return [
        Form(name, scheme, divided)
        for scheme, rules in SCHEMES.items()
        if layer.in_features % rules.in_features_multiple == 0
        and layer.out_features % rules.out_features_multiple == 0
        for divided in ([False, True] if name in divisors else [False])
    ]


@dataclass(frozen=True)
class LayerErrors:
    """One layer's weight (N, K) and bias, held as they are now, and what quantizing them costs.

    Attributes:
        divisor: (K,) what channels of a divided form are divided by.
    """

    weight: Tensor
    bias: Tensor | None
    divisor: Tensor | None

    @torch.no_grad()
    def of(
        self, x: Tensor, forms: Sequence[Form]
    ) -> Iterator[tuple[slice, Tensor, dict[Form, Tensor]]]:
        """(rows of the (M, K) form of x, the layer's own output for them, what each form adds to
        it), float32, band by band."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.float()
            bias = None if self.bias is None else self.bias.float()
            rounded = {form: self._rounded(weight, form) for form in forms}
            x_MK = x.detach().flatten(0, -2)
            for start in range(0, len(x_MK), BAND):
                rows = slice(start, min(start + BAND, len(x_MK)))
                band = x_MK[rows].float()
                expected = linear(band, weight, bias)
                yield (
                    rows,
                    expected,
                    {
                        form: self._product(band, rounded[form], bias, form) - expected
                        for form in forms
                    },
                )

    def _rounded(self, weight: Tensor, form: Form) -> Tensor:
        if form.divided and self.divisor is not None:
            weight = weight * self.divisor
        return dequantize_weight(*quantize_weight(weight, form.scheme))

    def _product(self, x_MK: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
        if form.divided and self.divisor is not None:
            x_MK = x_MK / self.divisor
        q, scale = quantize_activation(x_MK, form.scheme)
        return linear(dequantize_activation(q, scale, form.scheme), weight, bias)
