"""Text encoder, tokenizer and VAE of random weights, as large as a Wan model's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from turbo_opt.embedded import embedded

_DEVIATION = 0.02
_CLASSES = {
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


@dataclass(frozen=True)
class Size:
    """Of the text encoder and of the VAE; unless told, UMT5-XXL's and Wan2.1's."""

    vocabulary: int = 256_384
    layers: int = 24
    heads: int = 64
    hidden: int = 10_240
    vae_channels: int = 96


SMALL = Size(vocabulary=64, layers=1, heads=2, hidden=64, vae_channels=8)


def write_components(folder: Path, text_dim: int, size: Size, device: torch.device) -> None:
    """Put them into a diffusers folder that has a denoiser only.

    The tokenizer is tiny-wan's, whose words are the first ones of a larger vocabulary.

    Args:
        text_dim: channels of the embeddings.
        device: where weights are drawn.
    """
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=size.vocabulary,
        d_model=text_dim,
        d_kv=64,
        d_ff=size.hidden,
        num_layers=size.layers,
        num_heads=size.heads,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config).to(torch.bfloat16)
    _draw(encoder, device)
    encoder.tie_weights()
    encoder.save_pretrained(folder / "text_encoder")
    del encoder
    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=size.vae_channels).save_pretrained(folder / "vae")
    tiny_wan = embedded("tiny-wan")
    assert tiny_wan is not None
    shutil.copytree(tiny_wan / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    index = folder / "model_index.json"
    said = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps({**said, **_CLASSES}, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def _draw(network: nn.Module, device: torch.device) -> None:
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim < 2:  # scales of norms
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=_DEVIATION, generator=generator)
