"""What each Wan variant takes: example inputs on meta, and which of their sides may change.

B batch, F latent frames, H and W latent height and width, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

IMAGE_TOKENS = 257
"""Tokens of one image from the CLIP vision encoder (16×16 patches and the class token)."""
TEXT_TOKENS = 512
"""Text length that image-conditioned models are fixed to: diffusers splits off the image tokens
by counting 512 from the end."""
_EXAMPLE = {"batch": 2, "frames": 5, "height": 6, "width": 7, "text": 77, "timesteps": 210}


@dataclass(frozen=True)
class CaptureInputs:
    """Keyword arguments for torch.export, and their dynamic shapes."""

    tensors: Mapping[str, Tensor]
    dynamic_shapes: Mapping[str, Mapping[int, Any] | None]


def capture_inputs(
    class_name: str, config: Mapping[str, Any], dtype: torch.dtype, expand_timesteps: bool
) -> CaptureInputs:
    """Inputs of a denoiser of diffusers class `class_name` with this config.

    All tensors are on meta. Batch 1–64, frames 1–256, height and width up to 512 latent patches
    and text length from 2 tokens are symbolic.

    Args:
        expand_timesteps: a timestep for every token (Wan2.2 TI2V) instead of one for each clip.
    """
    longest = config.get("rope_max_seq_len", 1024)
    batch = Dim("batch", min=1, max=64)
    frames = Dim("frames", min=1, max=min(256, longest))
    rows, columns = (Dim(side, min=1, max=min(512, longest)) for side in ("rows", "columns"))
    patch_f, patch_h, patch_w = config.get("patch_size", (1, 2, 2))
    sides = {
        0: batch,
        2: patch_f * frames if patch_f > 1 else frames,
        3: patch_h * rows,
        4: patch_w * columns,
    }
    n = _EXAMPLE
    video = (n["frames"] * patch_f, n["height"] * patch_h, n["width"] * patch_w)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tensors = {
        "hidden_states": meta(n["batch"], config.get("in_channels", 16), *video),
        "timestep": meta(n["batch"], dtype=torch.float32),
        "encoder_hidden_states": meta(n["batch"], n["text"], config.get("text_dim", 4096)),
    }
    shapes: dict[str, Mapping[int, Any] | None] = {
        "hidden_states": sides,
        "timestep": {0: batch},
        "encoder_hidden_states": {0: batch, 1: Dim("text_tokens", min=2, max=4096)},
    }
    if expand_timesteps:
        tensors["timestep"] = meta(n["batch"], n["timesteps"], dtype=torch.float32)
        shapes["timestep"] = {0: batch, 1: Dim("timesteps", min=8, max=2**24)}
    if config.get("image_dim"):
        tensors["encoder_hidden_states"] = meta(
            n["batch"], TEXT_TOKENS, config.get("text_dim", 4096)
        )
        shapes["encoder_hidden_states"] = {0: batch}
        images = 2 if config.get("pos_embed_seq_len") else 1
        tensors["encoder_hidden_states_image"] = meta(
            images * n["batch"], IMAGE_TOKENS, config["image_dim"]
        )
        shapes["encoder_hidden_states_image"] = {0: images * batch if images > 1 else batch}
    if class_name == "WanVACETransformer3DModel":
        layers = len(config.get("vace_layers", ()))
        tensors["control_hidden_states"] = meta(
            n["batch"], config.get("vace_in_channels", 96), *video
        )
        tensors["control_hidden_states_scale"] = meta(layers)
        shapes["control_hidden_states"] = sides
        shapes["control_hidden_states_scale"] = None
    return CaptureInputs(tensors, shapes)
