"""The block quantization schemes: the one table from which everything else takes its numbers.

int8-block   symmetric int8, 128×128 blocks for weights and activations, scale = amax / 128,
             as in the released `-quant` checkpoints
fp8-block    float8 e4m3, 128×128 blocks for weights, 1×128 groups for activations,
             scale = amax / 448
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import OperatorInputError, name_the_nearest

BLOCK = 128
SMALLEST_AMAX = 1e-8  # keeps the scale of an all-zero block positive


@dataclass(frozen=True)
class Scheme:
    """How tensors of one scheme are stored.

    `value = q · scale`, with `scale = max(amax, 1e-8) / divisor` over one block and
    `q = round_half_even(value / scale)` limited to `lowest … highest`.
    Blocks are (rows, columns) of the (M, K) activation or the (N, K) weight.
    """

    name: str
    dtype: torch.dtype
    divisor: float
    lowest: float
    highest: float
    activation_block: tuple[int, int]
    weight_block: tuple[int, int]
    in_features_multiple: int
    out_features_multiple: int
    minimum_capability: tuple[int, int]


SCHEMES: dict[str, Scheme] = {
    "int8-block": Scheme(
        name="int8-block",
        dtype=torch.int8,
        divisor=128.0,
        lowest=-128.0,
        highest=127.0,
        activation_block=(BLOCK, BLOCK),
        weight_block=(BLOCK, BLOCK),
        in_features_multiple=BLOCK,
        out_features_multiple=1,
        minimum_capability=(8, 0),
    ),
    "fp8-block": Scheme(
        name="fp8-block",
        dtype=torch.float8_e4m3fn,
        divisor=448.0,
        lowest=-448.0,
        highest=448.0,
        activation_block=(1, BLOCK),
        weight_block=(BLOCK, BLOCK),
        in_features_multiple=BLOCK,
        out_features_multiple=1,
        minimum_capability=(8, 9),
    ),
}


def scheme_named(name: str) -> Scheme:
    """The scheme of that name; the error for an unknown one names the nearest."""
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise OperatorInputError(
            f"unknown quantization scheme {name!r}: {name_the_nearest(name, SCHEMES)}"
        )
    return scheme


def check_in_features(in_features: int, scheme: Scheme) -> None:
    """Raise unless the last dimension splits into whole blocks."""
    if in_features % scheme.in_features_multiple:
        raise OperatorInputError(
            f"{scheme.name}: the last dimension must be a multiple of "
            f"{scheme.in_features_multiple}, got {in_features}"
        )


def blocks(size: int) -> int:
    """How many blocks of 128 cover `size`."""
    return (size + BLOCK - 1) // BLOCK
