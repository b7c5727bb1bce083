"""Other ways to make diffusers' own denoiser fast without training, as far as pip installs them.

Each does what its documentation tells a user to do, one on top of the other, under torch.compile:

- `torchao-fp8`: the blocks' linear layers in e4m3, a scale for each row of activations and of
  weights (torchao's Float8DynamicActivationFloat8WeightConfig, by row).
- `torchao-fp8-sageattention`: besides, attention by the package `sageattention` in place of
  PyTorch's function, as its README says. Release 1.0.6 rounds q and k to int8 and multiplies P·v in
  16 bits, all in Triton; later releases are no wheels.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forward.floors import Computation

Attention = Callable[..., Tensor]
_LEAST_CAPABILITY = (8, 9)  # the first with products of e4m3


@dataclass(frozen=True)
class Rival:
    """One way.

    Attributes:
        package: what it needs installed, beside those of the rivals before it.
        change: what becomes of the model's blocks, for good.
        attention: imports what takes the place of scaled_dot_product_attention; None: nothing.
        computation: what its floor counts.
    """

    name: str
    package: str
    change: Callable[[nn.Module], None]
    attention: Callable[[], Attention] | None
    computation: Computation


def missing(rival: Rival, device: torch.device) -> str | None:
    """Why a rival cannot run here, or None."""
    if importlib.util.find_spec(rival.package) is None:
        return f"the package {rival.package} is not installed"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "it needs a GPU with products of e4m3"
    return None


@contextlib.contextmanager
def attending_as(rival: Rival) -> Iterator[None]:
    """Within the context, the rival's attention is called wherever PyTorch's would be."""
    functional: Any = nn.functional
    original = functional.scaled_dot_product_attention
    if rival.attention is not None:
        functional.scaled_dot_product_attention = rival.attention()
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def replaced_bytes(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Of the weights that the model has in another form by now."""
    return sum(
        weights[name].nbytes
        for name, parameter in model.named_parameters()
        if type(parameter) is not nn.Parameter
    )


def _in_fp8(blocks: nn.Module) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def _as_it_is(blocks: nn.Module) -> None:
    pass


def _sage() -> Attention:
    from sageattention import sageattn

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """(B, H, L, D) of each; only what a Wan denoiser asks for."""
        assert attn_mask is None and not dropout_p and not is_causal and not enable_gqa
        return sageattn(query, key, value, tensor_layout="HND", sm_scale=scale)

    return attention


RIVALS: Sequence[Rival] = (
    Rival("torchao-fp8", "torchao", _in_fp8, None, Computation("fp8-block")),
    Rival(
        "torchao-fp8-sageattention", "sageattention", _as_it_is, _sage,
        Computation("fp8-block", "sage-16bit"),
    ),
)  # fmt: skip
"""In the order in which they run: each keeps what those before it have changed."""
