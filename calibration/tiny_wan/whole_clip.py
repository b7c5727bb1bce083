"""The Wan VAE over a whole clip at once, equal to its frame-by-frame form.

diffusers runs the Wan VAE four frames at a time and carries the last frames of every causal
convolution to the next chunk. That saves memory on long videos and costs a launch per chunk and
layer. All of it is equivalent to plain causal convolutions over the clip, with two exceptions, both
of which treat the first frame alone:

- temporal downsampling keeps the first frame and convolves (stride 2) from it onwards;
- temporal upsampling keeps the first frame and doubles the rest, which do not see the first.

Training, encoding a data set and scoring use this form. It needs no gradient tricks and compiles.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents of (B, 3, 4n+1, H, W), each (B, 16, n+1, H/4, W/4)."""
    if video.shape[2] % 4 != 1:
        raise ValueError(f"a clip has 4n+1 frames, got {video.shape[2]}")
    encoder = vae.encoder
    x = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        x = _downsample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video of latents (B, 16, n+1, h, w), as (B, 3, 4n+1, 4h, 4w); not clamped to [-1, 1]."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = layer(x)
        for layer in block.upsamplers or ():
            x = _upsample(layer, x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def _downsample(layer: WanResample, x: Tensor) -> Tensor:
    x = layer(x)  # without a cache: in space only
    if layer.mode != "downsample3d":
        return x
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)


def _upsample(layer: WanResample, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d":
        first, rest = x[:, :, :1], layer.time_conv(x[:, :, 1:])
        # Channels hold (even frame, odd frame): interleave them in time.
        rest = rest.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x = torch.cat([first, rest], dim=2)
    return layer(x)
