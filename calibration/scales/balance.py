"""Which linear layers' channels can be balanced without changing what the network computes.

SmoothQuant divides channel j of a layer's input by s_j and multiplies column j of its weight:

    s_j = amax(x_j)^α / amax(W_j)^(1−α)

Here s_j is rounded to a power of two, so that only exponents change and folding is exact in every
floating-point format. It is folded into what the LayerNorm before does to each channel:

    attn1.to_q, to_k, to_v   modulation of the first norm
    attn2.to_q               weight and bias of the second
    ffn.net.0.proj           modulation of the third

`ffn.net.2` follows GELU, and `attn2.to_k` and `to_v` read the text embedding of all blocks: there
is nothing before them to fold into. `to_out` could be balanced by the rows of `to_v`, exactly where
attention has no projection of its own; on tiny-wan that lost 0.4 to 1.2 dB of int8 in each of eight
places and moved fp8 by less than 0.2 dB either way, as rows of `to_v` share scales too, so it is
left out. Source: SmoothQuant, arXiv 2211.10438, eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from turbo_opt.calibration.scales.statistics import rounded

LARGEST = 8
"""Channels are divided by 2^−8 to 2^8."""


Group = tuple[str, ...]
"""Names of linear layers that read one tensor, written by a norm."""


def balanced_groups(network: nn.Module) -> Iterator[Group]:
    """Where channels can be divided, in the order of the network."""
    blocks: Iterable[nn.Module] = network.blocks  # type: ignore[assignment]
    for index, block in enumerate(blocks):
        stem = f"blocks.{index}"
        yield tuple(f"{stem}.attn1.{name}" for name in ("to_q", "to_k", "to_v"))
        if not isinstance(block.norm2, nn.Identity):
            yield (f"{stem}.attn2.to_q",)
        yield (f"{stem}.ffn.net.0.proj",)


def exponents(channel_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """(K,) int32: channel j is divided by 2 to this power.

    Args:
        channel_amax: (K,) of the input.
        weight_amax: (K,) of the columns of all layers that read it.
    """
    logs = [
        values.double().clamp_min(float(values.max()) * 2.0**-20 or 1.0).log2()
        for values in (channel_amax, weight_amax)
    ]
    wanted = alpha * logs[0] - (1 - alpha) * logs[1]
    # Only ratios matter: a factor common to all channels is taken up by the scales.
    return (wanted - wanted.median()).round().clamp(-LARGEST, LARGEST).int()


def gain(before: Mapping[str, Iterable[float]], after: Mapping[str, Iterable[float]]) -> float:
    """By how many dB the relative noise of all layers together falls.

    Args:
        before, after: layer → dB of its output at each noise level.
    """
    noise = [
        sum(10 ** (-value / 10) for levels in side.values() for value in levels)
        for side in (before, after)
    ]
    return rounded(10 * math.log10(noise[0] / noise[1])) if all(noise) else 0.0
