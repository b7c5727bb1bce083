"""Activations of the shipped tiny-wan, recorded while it draws a caption."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import turbo_opt

CAPTION = "a red circle moves left to right on a blue background"
STEPS, RECORDED_STEPS = 6, (1, 4)  # one in the noise, one where the clip can be seen


@dataclass(frozen=True)
class LinearCall:
    """x (B, L, K) into a linear layer of a block, and its parameters, float32."""

    name: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class NormCall:
    """x (B, L, C) into a norm of a block; `kind` is `layer_norm` or `rms_norm`."""

    kind: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass
class Recording:
    """What went into the layers of all blocks, at the recorded steps, in the order of the calls.

    Attributes:
        attention: q, k and v (B, H, L, 128) of self-attention, normalized and rotated.
        modulation: a block's own table (1, 6, C): shift, scale and gate of both its halves.
    """

    linear: list[LinearCall] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    attention: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    modulation: Tensor = field(default_factory=lambda: torch.empty(0))


@functools.cache
def recording() -> Recording:
    """Six steps of tiny-wan in float32 on the CPU, without guidance."""
    from diffusers import WanPipeline

    folder = Path(turbo_opt.__file__).parent / "models" / "tiny_wan"
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    blocks: nn.Module = pipeline.transformer.blocks
    names = {parameter: name for name, parameter in blocks.named_parameters()}
    recorder = _Recorder(names)
    recorder.found.modulation = blocks[0].scale_shift_table.detach()

    def next_step(pipe: Any, index: int, timestep: Any, values: Any) -> Any:
        recorder.on = index + 1 in RECORDED_STEPS
        return values

    with torch.no_grad(), recorder:
        pipeline(
            CAPTION, height=96, width=96, num_frames=17, num_inference_steps=STEPS,
            guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
            callback_on_step_end=next_step,
        )  # fmt: skip
    return recorder.found


class _Recorder(TorchFunctionMode):
    def __init__(self, names: Mapping[Tensor, str]) -> None:
        super().__init__()
        self.names = names
        self.found = Recording()
        self.on = False

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.on:
            self._record(function, args, kwargs)
        return function(*args, **kwargs)

    def _record(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if function is F.linear and args[1] in self.names:
            name = self.names[args[1]].removesuffix(".weight")
            self.found.linear.append(LinearCall(name, *(x.detach() for x in args[:3])))
        elif function is F.scaled_dot_product_attention:
            q, k, v = args if args else (kwargs[name] for name in ("query", "key", "value"))
            if q.shape == k.shape:
                self.found.attention.append((q, k, v))
        elif function in (F.layer_norm, F.rms_norm):
            given = dict(zip(("input", "shape", "weight", "bias", "eps"), args))
            if function is F.rms_norm:
                given = dict(zip(("input", "shape", "weight", "eps"), args))
            given |= kwargs
            weight, bias = (
                None if given.get(name) is None else given[name].detach()
                for name in ("weight", "bias")
            )
            self.found.norms.append(
                NormCall(function.__name__, given["input"], weight, bias, given["eps"])
            )
