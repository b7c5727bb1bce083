"""Train the denoiser and the text encoder together, by rectified flow matching.

    x_σ = (1 − σ)·x₀ + σ·ε        target v = ε − x₀        network(x_σ, 1000·σ, text) ≈ v

x₀ are normalised latents of captioned clips, encoded once and kept on the device. σ is uniform,
stratified over the batch, then shifted as the sampler shifts it: σ ← s·σ / (1 + (s − 1)·σ). A tenth
of the captions are empty, for guidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from turbo_opt.calibration.flow import tensor_float
from turbo_opt.calibration.latents import normalise

from . import whole_clip
from .architecture import (
    CAPTION_LENGTH,
    FLOW_SHIFT,
    TransformerSize,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    parameter_count,
)
from .clips import (
    TEMPLATES,
    Scene,
    caption,
    combinations,
    render_table,
    sample_scenes,
    scene_table,
)
from .compact_text import CompactText
from .training import Budget, LossFunction, TrainingState, autocast, faster, train


@dataclass(frozen=True)
class DenoiserTraining:
    """Settings of one training."""

    size: TransformerSize = field(default_factory=TransformerSize)
    batch: int = 256
    clips: int = 80_000
    peak_rate: float = 1.5e-3
    caption_dropout: float = 0.1
    canonical_share: float = 0.6
    """Share of captions in the canonical form; the others use a paraphrase."""
    seed: int = 0
    mixed_precision: bool = True
    compile: bool = True
    log_every: int = 100


@dataclass(frozen=True)
class LatentClips:
    """A training set on the device."""

    latents: Tensor
    """(N, 16, F, h, w) float16, normalised."""
    combination: Tensor
    """(N,) index into ``captions``."""
    captions: Tensor
    """(combinations, templates, CAPTION_LENGTH) token ids."""
    empty: Tensor
    """(CAPTION_LENGTH,) token ids of the empty caption."""


@tensor_float()
def train_denoiser(
    settings: DenoiserTraining,
    budget: Budget,
    work: Path,
    device: torch.device,
    resume: bool = False,
) -> bool:
    """Train into ``work/transformer`` and ``work/text_encoder``; True when the budget is used up.

    Needs ``work/vae``, as train_vae leaves it.
    """
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    transformer = build_transformer(settings.size)
    text_encoder = build_text_encoder(len(tokenizer))
    model = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder}).to(device)
    model.train()
    print(f"transformer: {parameter_count(transformer):,} parameters")
    print(f"text encoder: {parameter_count(text_encoder):,} parameters")
    state = TrainingState(model, device, settings.seed)
    if resume:
        state.load(work / "denoiser.state.safetensors")
        print(f"denoiser: resumed at step {state.step}, {state.minutes:.2f} minutes")

    vae = AutoencoderKLWan.from_pretrained(work / "vae").to(device).eval()
    scenes = sample_scenes(settings.clips, settings.seed, split="train")
    clips = encode_clips(vae, scenes, tokenizer, device, settings.mixed_precision)
    del vae

    with CompactText(transformer) as text:
        finished = train(
            state,
            _loss_function(model, text, clips, settings, device, state.generator),
            budget,
            peak_rate=settings.peak_rate,
            folder=work,
            name="denoiser",
            log_every=settings.log_every,
        )
    state.use_average()
    transformer.save_pretrained(work / "transformer")
    text_encoder.save_pretrained(work / "text_encoder")
    report = {"steps": state.step, "minutes": state.minutes, "batch": settings.batch}
    (work / "denoiser.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"denoiser: {json.dumps(report)}", flush=True)
    return finished


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan,
    scenes: list[Scene],
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    mixed_precision: bool = True,
    batch: int = 128,
) -> LatentClips:
    """Draw and encode scenes, and tokenise every caption there is."""
    table = scene_table(scenes, device)
    latents = []
    for rows in table.split(batch):
        with autocast(device, mixed_precision):
            mean, _ = whole_clip.encode(vae, render_table(rows))
        latents.append(normalise(vae, mean.float()).half())
    known = combinations()
    index = {each: i for i, each in enumerate(known)}
    texts = [caption(each, i) for each in known for i in range(len(TEMPLATES))]
    captions = _token_ids(tokenizer, texts).view(len(known), len(TEMPLATES), -1)
    result = LatentClips(
        latents=torch.cat(latents),
        combination=torch.tensor([index[scene.combination] for scene in scenes], device=device),
        captions=captions.to(device),
        empty=_token_ids(tokenizer, [""])[0].to(device),
    )
    deviation = result.latents[:1024].float().std()
    print(
        f"encoded {len(scenes):,} clips; deviation of the latents {deviation:.3f}",
        flush=True,
    )
    return result


def shifted_sigmas(
    count: int,
    generator: torch.Generator,
    device: torch.device,
    shift: float = FLOW_SHIFT,
) -> Tensor:
    """Noise levels (count,), one from each of ``count`` equal strata, then shifted."""
    strata = torch.arange(count, device=device)
    sigma = (strata + torch.rand(count, generator=generator, device=device)) / count
    return shift * sigma / (1 + (shift - 1) * sigma)


def encode_text(
    text_encoder: UMT5EncoderModel, token_ids: Tensor, pad_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, T, C), zero at padding as WanPipeline makes them, and the mask (B, T)."""
    mask = (token_ids != pad_token_id).long()
    embeddings = text_encoder(token_ids, mask).last_hidden_state
    return embeddings * mask.unsqueeze(-1), mask


def _token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    encoded = tokenizer(
        texts, padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt"
    ).input_ids
    if encoded.shape[1] != CAPTION_LENGTH or not (encoded == 0).any(dim=1).all():
        raise ValueError(f"captions must leave padding in {CAPTION_LENGTH} tokens")
    return encoded


def _draw(
    clips: LatentClips, settings: DenoiserTraining, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch of clean latents (B, …) in float32 and of token ids (B, CAPTION_LENGTH)."""
    device, count = clips.latents.device, settings.batch

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, device=device)

    index = torch.randint(len(clips.latents), (count,), generator=generator, device=device)
    paraphrase = 1 + (uniform() * (len(TEMPLATES) - 1)).long()
    template = torch.where(uniform() < settings.canonical_share, 0, paraphrase)
    token_ids = clips.captions[clips.combination[index], template]
    dropped = (uniform() < settings.caption_dropout).unsqueeze(1)
    return clips.latents[index].float(), torch.where(dropped, clips.empty, token_ids)


def _loss_function(
    model: nn.ModuleDict,
    text: CompactText,
    clips: LatentClips,
    settings: DenoiserTraining,
    device: torch.device,
    generator: torch.Generator,
) -> LossFunction:
    """What the training loop calls for each batch."""
    transformer, text_encoder = model["transformer"], model["text_encoder"]

    def forward(noisy: Tensor, sigma: Tensor, embeddings: Tensor) -> Tensor:
        return transformer(noisy, 1000 * sigma, embeddings, return_dict=False)[0]

    def loss(function: Callable[..., Tensor]) -> dict[str, Tensor]:
        clean, token_ids = _draw(clips, settings, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        sigma = shifted_sigmas(len(clean), generator, device)
        level = sigma.view(-1, 1, 1, 1, 1)
        with autocast(device, settings.mixed_precision):
            embeddings, mask = encode_text(text_encoder, token_ids)
            text.set(mask)
            velocity = function(torch.lerp(clean, noise, level), sigma, embeddings)
        return {"loss": (velocity.float() - (noise - clean)).square().mean()}

    def run(candidate: Callable[..., Tensor]) -> None:
        loss(candidate)["loss"].backward()
        model.zero_grad(set_to_none=True)

    function = faster("denoiser", forward, run, generator) if settings.compile else forward
    return lambda: loss(function)
