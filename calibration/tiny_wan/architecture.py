"""The parts of tiny-wan: the classes of Wan2.1 T2V, each as small as the task allows.

A 17×96×96 clip becomes 16×5×24×24 latents and so 5·12·12 = 720 tokens. Every linear layer's sides
are multiples of 128 (but for the patch projections), so that kernels made for large models apply.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, TEMPLATES

TEXT_LENGTH = 512
"""Text positions that the denoiser attends to; WanPipeline's default."""

CAPTION_LENGTH = 24
"""Tokens that hold any caption with its end token; the rest of TEXT_LENGTH is padding."""

FLOW_SHIFT = 3.0


@dataclass(frozen=True)
class TransformerSize:
    num_layers: int = 4
    num_attention_heads: int = 2
    attention_head_dim: int = 128
    ffn_dim: int = 768
    freq_dim: int = 256


@dataclass(frozen=True)
class VAESize:
    base_dim: int = 16
    num_res_blocks: int = 1


LATENT_CHANNELS = 16
_POSITION_BUCKETS = 32
_NEIGHBOUR_BIAS = 5.0
TEXT_DIM = 128


def build_transformer(size: TransformerSize | None = None) -> WanTransformer3DModel:
    """The denoiser, freshly initialised; its output starts at zero."""
    model = WanTransformer3DModel(
        **asdict(size or TransformerSize()),
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads",
        cross_attn_norm=True,
        eps=1e-6,
    )
    with torch.no_grad():
        for parameter in model.proj_out.parameters():
            parameter.zero_()
    return model


def build_vae(size: VAESize | None = None) -> AutoencoderKLWan:
    """The autoencoder: 4× in time, height and width, 16 channels; latents not yet normalised.

    Starts as :func:`_initialise_vae` says.
    """
    model = AutoencoderKLWan(
        **asdict(size or VAESize()),
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3],
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    _initialise_vae(model)
    return model


@torch.no_grad()
def _initialise_vae(vae: AutoencoderKLWan) -> None:
    """Start near a network that passes every frame through on its own, almost without noise.

    PyTorch's default convolutions shrink the signal under their biases, see mostly other frames,
    and begin with latents drowned in unit noise; the first thousand steps would go into that.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            if module.kernel_size[0] == 3 and isinstance(module, torch.nn.Conv3d):
                deviation = module.weight[0, :, -1].numel() ** -0.5
                torch.nn.init.normal_(module.weight, std=0.1 * deviation)
                torch.nn.init.normal_(module.weight[:, :, -1], std=deviation)
            else:
                torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(0.1)
    vae.quant_conv.weight[LATENT_CHANNELS:].mul_(0.1)
    vae.quant_conv.bias[LATENT_CHANNELS:].fill_(-6.0)  # log variance


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """The text encoder, freshly initialised, each attention head looking at one near word.

    With the default initialisation two layers never learned the order of words: "left to right"
    and "right to left" had the same embeddings, and half of those clips moved the wrong way. A
    relative bias towards one neighbour per head makes order visible from the first step.
    """
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=64,
            num_heads=2,
            d_ff=256,
            num_layers=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=_POSITION_BUCKETS,
            relative_attention_max_distance=64,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        for block, offsets in zip(encoder.encoder.block, ((-1, 1), (-2, 2)), strict=True):
            bias = block.layer[0].SelfAttention.relative_attention_bias.weight
            for head, offset in enumerate(offsets):
                bias[_position_bucket(offset), head] += _NEIGHBOUR_BIAS
    return encoder


def _position_bucket(offset: int) -> int:
    """Row of T5's table of relative biases for a key `offset` words after the query."""
    return abs(offset) + (_POSITION_BUCKETS // 2 if offset > 0 else 0)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the captions, and an end token after each text, as T5 has it."""
    phrases = [*COLOURS, *BACKGROUNDS, *SHAPES, *MOTIONS]
    phrases += [template.format_map(_Blank()) for template in TEMPLATES]
    words = sorted({word for text in phrases for word in text.replace(",", " , ").split()})
    words = sorted({*words, "a", "an"})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """Wan's sampler: UniPC on the flow prediction."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=FLOW_SHIFT,
    )


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def file_mebibytes(path: Path) -> float:
    return path.stat().st_size / 2**20


class _Blank(dict[str, str]):
    """Formats every placeholder of a template as nothing."""

    def __missing__(self, key: str) -> str:
        return ""
