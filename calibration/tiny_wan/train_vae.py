"""Train the autoencoder on clips drawn on the fly.

    loss = L1(video) + MSE(video) + L1(its spatial differences) + λ · KL(latents ‖ N(0, 1))

No perceptual or adversarial term: the clips are flat shapes, so right colours and crisp edges are
all there is. A little colour jitter covers the space between the palette's entries. Afterwards the
latents' mean and deviation per channel are measured and stored in the model's config.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from . import whole_clip
from .architecture import VAESize, build_vae, parameter_count
from .clips import render, render_table, sample_scenes, scene_table
from .detectors import ATTRIBUTES, score_batch
from .training import Budget, LossFunction, TrainingState, autocast, faster, train


@dataclass(frozen=True)
class VAETraining:
    """Settings of one training."""

    size: VAESize = field(default_factory=VAESize)
    batch: int = 32
    scenes: int = 50_000
    peak_rate: float = 1e-3
    kl_weight: float = 2e-4
    colour_jitter: float = 0.1
    measured_clips: int = 2048
    """Clips from which the latents' statistics are measured; an eighth of them test the result."""
    seed: int = 0
    mixed_precision: bool = True
    compile: bool = True
    log_every: int = 50


def train_vae(
    settings: VAETraining,
    budget: Budget,
    work: Path,
    device: torch.device,
    resume: bool = False,
) -> bool:
    """Train into ``work/vae`` (a diffusers folder); True when the budget is used up."""
    torch.manual_seed(settings.seed)
    torch.backends.cudnn.benchmark = True
    vae = build_vae(settings.size).to(device).train()
    print(f"vae: {parameter_count(vae):,} parameters")
    state = TrainingState(vae, device, settings.seed)
    if resume:
        state.load(work / "vae.state.safetensors")
        print(f"vae: resumed at step {state.step}, {state.minutes:.2f} minutes")

    loss_function = _loss_function(vae, settings, device, state.generator)
    finished = train(
        state,
        loss_function,
        budget,
        peak_rate=settings.peak_rate,
        folder=work,
        name="vae",
        log_every=settings.log_every,
    )
    state.use_average()
    vae.eval()
    measure_latents(vae, settings.measured_clips, device, seed=settings.seed + 1)
    vae.save_pretrained(work / "vae")
    report = reconstruction_report(vae, max(8, settings.measured_clips // 8), device)
    report |= {"steps": state.step, "minutes": state.minutes}
    (work / "vae.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"vae: {json.dumps(report)}", flush=True)
    return finished


def reconstruct(vae: AutoencoderKLWan, video: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """Reconstruction through noisy latents, and the latents' mean and log variance."""
    mean, log_variance = whole_clip.encode(vae, video)
    latents = mean + (0.5 * log_variance).exp() * noise
    return whole_clip.decode(vae, latents), mean, log_variance


def reconstruction_loss(
    video: Tensor, drawn: Tensor, mean: Tensor, log_variance: Tensor, kl_weight: float
) -> dict[str, Tensor]:
    """The loss and its terms, all scalars."""
    error = drawn.float() - video
    l1, mse = error.abs().mean(), error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, log_variance = mean.float(), log_variance.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = l1 + mse + edges + kl_weight * kl
    return {"loss": loss, "l1": l1, "mse": mse, "edges": edges, "kl": kl}


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLWan, clips: int, device: torch.device, seed: int, batch: int = 32
) -> None:
    """Store mean and standard deviation of each latent channel over training clips."""
    count = 0
    total, squares = torch.zeros(2, vae.config.z_dim, dtype=torch.float64, device=device)
    scenes = sample_scenes(clips, seed, split="train")
    for start in range(0, clips, batch):
        mean, _ = whole_clip.encode(vae, render(scenes[start : start + batch], device))
        values = mean.double().transpose(0, 1).flatten(1)
        count += values.shape[1]
        total += values.sum(dim=1)
        squares += values.square().sum(dim=1)
    average = total / count
    deviation = (squares / count - average.square()).clamp(min=1e-8).sqrt()
    vae.register_to_config(
        latents_mean=[round(value, 6) for value in average.tolist()],
        latents_std=[round(value, 6) for value in deviation.tolist()],
    )


@torch.no_grad()
def reconstruction_report(
    vae: AutoencoderKLWan, clips: int, device: torch.device, batch: int = 16
) -> dict[str, float]:
    """PSNR in dB and share of right detections on reconstructed held-out scenes."""
    scenes = sample_scenes(clips, seed=2, split="held-out")
    squared_error, right = 0.0, dict.fromkeys(ATTRIBUTES, 0)
    for start in range(0, clips, batch):
        chunk = scenes[start : start + batch]
        video = render(chunk, device)
        mean, _ = whole_clip.encode(vae, video.to(vae.dtype))
        drawn = whole_clip.decode(vae, mean).float().clamp(-1, 1)
        squared_error += float((drawn - video).square().mean(dim=(1, 2, 3, 4)).sum())
        for result in score_batch(drawn, chunk):
            for name, is_right in result.items():
                right[name] += is_right
    psnr = -10 * torch.log10(torch.tensor(squared_error / clips / 4)).item()  # peak to peak 2
    return {"clips": clips, "psnr_db": psnr} | {name: n / clips for name, n in right.items()}


def _loss_function(
    vae: AutoencoderKLWan,
    settings: VAETraining,
    device: torch.device,
    generator: torch.Generator,
) -> LossFunction:
    """What the training loop calls for each batch."""
    scenes = sample_scenes(settings.scenes, settings.seed, split="train")
    table = scene_table(scenes, device)

    def batch() -> Tensor:
        index = torch.randint(len(table), (settings.batch,), generator=generator, device=device)
        rows = table[index]
        jitter = torch.rand(len(rows), 6, generator=generator, device=device) * 2 - 1
        rows[:, 7:] = (rows[:, 7:] + settings.colour_jitter * jitter).clamp(-1, 1)
        return render_table(rows)

    def noise_for(video: Tensor) -> Tensor:
        b, _, f, h, w = video.shape
        shape = (b, vae.config.z_dim, (f - 1) // 4 + 1, h // 4, w // 4)
        return torch.randn(shape, generator=generator, device=device)

    def forward(video: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return reconstruct(vae, video, noise)

    def loss(function: Callable[..., Any], video: Tensor) -> dict[str, Tensor]:
        with autocast(device, settings.mixed_precision):
            drawn, mean, log_variance = function(video, noise_for(video))
        return reconstruction_loss(video, drawn, mean, log_variance, settings.kl_weight)

    function: Callable[..., Any] = forward
    if settings.compile:
        example = batch()

        def run(candidate: Callable[..., Any]) -> None:
            loss(candidate, example)["loss"].backward()
            vae.zero_grad(set_to_none=True)

        function = faster("vae", forward, run, generator)
    return lambda: loss(function, batch())
