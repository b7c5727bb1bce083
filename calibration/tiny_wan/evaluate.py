"""Sample the assembled pipeline on held-out captions and score what it draws.

The sampler is WanPipeline itself: UniPC with the folder's scheduler, guidance against the empty
prompt, text padded to 512. Starting noise is drawn on the CPU, clip by clip, so that the same seed
means the same noise on every device and at every batch size.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from .architecture import LATENT_CHANNELS
from .clips import FRAMES, SIZE, Combination, caption, sample_scenes
from .detectors import ATTRIBUTES, score_batch
from .train_vae import reconstruction_report

#: What the project asks of tiny-wan on held-out captions.
REQUIRED = {"colour": 0.90, "shape": 0.90, "motion": 0.85}


@dataclass(frozen=True)
class Evaluation:
    """Settings of one evaluation."""

    prompts: int = 256
    steps: int = 50
    guidance_scale: float = 4.0
    batch: int = 64
    seed: int = 0
    vae_clips: int = 64


def load_pipeline(folder: Path, device: torch.device) -> WanPipeline:
    """The pipeline of an assembled folder, in float32, without a progress bar."""
    pipeline = WanPipeline.from_pretrained(folder).to(device, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def starting_noise(count: int, seed: int) -> Tensor:
    """Latent noise (count, 16, 5, 24, 24); clip i depends on seed and i only."""
    shape = (LATENT_CHANNELS, (FRAMES - 1) // 4 + 1, SIZE // 4, SIZE // 4)
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 * seed + i))
            for i in range(count)
        ]
    )


def sample(
    pipeline: WanPipeline, prompts: list[str], noise: Tensor, settings: Evaluation
) -> Tensor:
    """Videos (B, 3, F, H, W) in [-1, 1] on the pipeline's device."""
    videos = []
    for start in range(0, len(prompts), settings.batch):
        chunk = prompts[start : start + settings.batch]
        frames = pipeline(
            prompt=chunk,
            negative_prompt=[""] * len(chunk),
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            latents=noise[start : start + len(chunk)],
            output_type="pt",
        ).frames
        videos.append(frames.movedim(2, 1).float() * 2 - 1)
    return torch.cat(videos)


def evaluate(
    pipeline: WanPipeline, settings: Evaluation, sheet: Path | None = None
) -> dict[str, Any]:
    """Accuracy per attribute and per value of it, VAE quality, and the settings."""
    wanted = [
        scene.combination
        for scene in sample_scenes(settings.prompts, settings.seed, split="held-out")
    ]
    started = time.monotonic()
    noise = starting_noise(len(wanted), settings.seed)
    videos = sample(pipeline, [caption(each) for each in wanted], noise, settings)
    seconds = time.monotonic() - started
    results = score_batch(videos, wanted)
    if sheet is not None:
        contact_sheet(videos[:16].cpu(), wanted[:16], results[:16]).save(sheet)

    accuracy = _accuracy(results)
    return {
        "split": "held-out",
        "settings": asdict(settings),
        "accuracy": accuracy,
        "all_right": sum(all(result.values()) for result in results) / len(results),
        "required": REQUIRED,
        "passed": all(accuracy[name] >= least for name, least in REQUIRED.items()),
        "by_value": _by_value(wanted, results),
        "vae": reconstruction_report(pipeline.vae, settings.vae_clips, pipeline.device),
        "seconds_per_clip": seconds / len(wanted),
        "device": pipeline.device.type,
        "torch": torch.__version__,
    }


def contact_sheet(
    videos: Tensor,
    wanted: list[Combination],
    results: list[dict[str, bool]],
    columns: int = 2,
) -> Image.Image:
    """Five frames of each clip under its caption, with the attributes that came out wrong."""
    shown = (0, 4, 8, 12, 16)
    width, height, text = len(shown) * SIZE + 8, SIZE + 20, 14
    rows = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (video, what, result) in enumerate(zip(videos, wanted, results, strict=True)):
        left, top = (i % columns) * width, (i // columns) * height
        wrong = [name for name, right in result.items() if not right]
        note = f"  [wrong: {', '.join(wrong)}]" if wrong else ""
        pen.text((left, top), caption(what) + note, fill="red" if wrong else "black")
        strip = torch.cat([video[:, frame] for frame in shown], dim=-1)
        pixels = ((strip + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
        sheet.paste(Image.fromarray(pixels.numpy()), (left, top + text))
    return sheet


def write_report(path: Path, reports: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(reports, indent=2) + "\n")


def _accuracy(results: list[dict[str, bool]]) -> dict[str, float]:
    return {name: sum(result[name] for result in results) / len(results) for name in ATTRIBUTES}


def _by_value(
    wanted: list[Combination], results: list[dict[str, bool]]
) -> dict[str, dict[str, dict[str, int]]]:
    """For each attribute and value of it, how many clips showed it, of how many that should."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name in ATTRIBUTES:
        counts: dict[str, dict[str, int]] = defaultdict(lambda: {"right": 0, "of": 0})
        for what, result in zip(wanted, results, strict=True):
            count = counts[getattr(what, name)]
            count["of"] += 1
            count["right"] += result[name]
        table[name] = dict(sorted(counts.items()))
    return table
