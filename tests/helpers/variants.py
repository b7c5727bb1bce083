"""Every Wan variant in small: a diffusers model of random weights, its capture, its inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from turbo_opt.capture.export import export_denoiser
from turbo_opt.ir.program import Components, Denoiser, Program
from turbo_opt.ir.schedule import Schedule
from turbo_opt.ir.weights import WeightStore, constant
from turbo_opt.runtime.module import CompiledTransformer

_SMALL: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "num_layers": 2,
    "ffn_dim": 256,
    "text_dim": 64,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256}
_TEXT_TOKENS = {"t2v": 21, "ti2v": 21, "vace": 21}


@dataclass(frozen=True)
class Variant:
    """What sets one member of the Wan family apart."""

    name: str
    model_class: str = "WanTransformer3DModel"
    extra: Mapping[str, Any] | None = None
    expand_timesteps: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The diffusers config."""
        return {**_SMALL, **(self.extra or {})}


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("t2v"),
        Variant("i2v", extra=_IMAGE),
        Variant("i2v-without-image-tokens", extra={"in_channels": 36}),
        Variant("flf2v", extra={**_IMAGE, "pos_embed_seq_len": 514}),
        Variant(
            "vace",
            "WanVACETransformer3DModel",
            {"vace_layers": [0, 1], "vace_in_channels": 96},
        ),
        Variant("ti2v", extra={"in_channels": 48, "out_channels": 48}, expand_timesteps=True),
    )
}

IN_EVERY_DTYPE = [
    *((name, torch.float32) for name in VARIANTS),
    *((name, torch.bfloat16) for name in ("t2v", "i2v")),
]
"""Variants to compute with: bfloat16 adds casts to the graph, which two of them show. The shipped
recipes go over every variant in the dtype that they name."""


def random_model(variant: Variant, dtype: torch.dtype) -> nn.Module:
    """The diffusers model with every parameter drawn from one seed, in the dtypes of a capture."""
    model = getattr(diffusers, variant.model_class).from_config(variant.config).eval()
    captured = _captured(variant.name, dtype).exported.state_dict
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
        parameter.data = parameter.data.to(captured[name].dtype)
        parameter.requires_grad_(False)
    return model


def captured_program(variant: Variant, dtype: torch.dtype = torch.float32) -> Program:
    """A fresh Program of the variant with the weights of `random_model`."""
    graph = _captured(variant.name, dtype)
    values = {**random_model(variant, dtype).state_dict(), **graph.tables}
    store = WeightStore({name: constant(values[name]) for name in graph.exported.state_dict})
    denoiser = Denoiser(
        "transformer", graph.exported, store, variant.model_class, variant.config
    ).fork()
    components = Components("random", "WanPipeline", {})
    return Program({"transformer": denoiser}, Schedule(()), components)


def compiled(program: Program) -> CompiledTransformer:
    """The program's only denoiser, ready to call on the CPU."""
    (denoiser,) = program
    weights = {name: tensor.load() for name, tensor in denoiser.weights.items()}
    return CompiledTransformer.build(
        denoiser.exported, weights, denoiser.config, "cpu", denoiser.stages
    )


def random_inputs(
    variant: Variant,
    batch: int,
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Inputs for a latent of that size, from one seed; the timestep is integral as diffusers'."""
    torch.manual_seed(1)
    config = variant.config
    text = _TEXT_TOKENS.get(variant.name, 512) if not config.get("image_dim") else 512
    inputs = {
        "hidden_states": torch.randn(batch, config["in_channels"], frames, height, width),
        "encoder_hidden_states": torch.randn(batch, text, config["text_dim"]),
    }
    if config.get("image_dim"):
        images = 2 * batch if config.get("pos_embed_seq_len") else batch
        inputs["encoder_hidden_states_image"] = torch.randn(images, 257, config["image_dim"])
    if variant.name == "vace":
        inputs["control_hidden_states"] = torch.randn(batch, 96, frames, height, width)
        inputs["control_hidden_states_scale"] = torch.tensor([1.0, 0.5])
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    steps = (batch, frames * height * width // 4) if variant.expand_timesteps else (batch,)
    inputs["timestep"] = torch.randint(0, 1000, steps)
    return inputs


@functools.cache
def _captured(name: str, dtype: torch.dtype) -> Any:
    variant = VARIANTS[name]
    return export_denoiser(variant.model_class, variant.config, dtype, variant.expand_timesteps)
