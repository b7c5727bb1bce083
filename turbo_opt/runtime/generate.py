"""A prompt into a clip, by a loaded artifact and the sampling loop that its schedule describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.runtime.components import components_folder, load_components
from turbo_opt.runtime.limits import Granularity, LatentLimits, check_size
from turbo_opt.runtime.sampler import initial_latents, sample

if TYPE_CHECKING:
    from turbo_opt.artifact.load import LoadedArtifact
    from turbo_opt.artifact.manifest import Manifest

Progress = Callable[[str, int, int], None]
"""Told (stage, done, in all); the stages are `text`, `denoise` and `decode`."""


@dataclass(frozen=True)
class ClipOptions:
    """What a clip is like, unless the caller says otherwise: 480p, five seconds.

    Attributes:
        fps: frames per second of the file that is written.
        max_sequence_length: prompt length in text tokens; shorter ones are padded.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: float = 16.0
    negative_prompt: str = ""
    max_sequence_length: int = 512


def clip_options(manifest: Manifest, **given: Any) -> ClipOptions:
    """Options of a clip: those given (None is not), then the recipe's `generate`, then 480p."""
    recipe: Mapping[str, Any] = manifest.recipe.get("generate") or {}
    names = {field.name for field in fields(ClipOptions)}
    chosen = {key: value for key, value in recipe.items() if key in names and value is not None}
    chosen |= {key: value for key, value in given.items() if value is not None}
    return replace(ClipOptions(), **chosen)


def check_clip(
    path: Path,
    manifest: Manifest,
    limits: LatentLimits,
    options: ClipOptions,
    components: str | None = None,
) -> Granularity:
    """How pixels of a clip that an artifact can make map to latents.

    Args:
        path: of the artifact.
        components: diffusers folder with the VAE, if not the recorded one.

    Raises:
        BadInput: the model takes no such size, is conditioned on images, or its VAE is not there.
    """
    _check_text_only(path, manifest)
    folder = components_folder(path, manifest.components, components)
    grain = Granularity.of(folder / "vae", manifest.config)
    check_size(options.height, options.width, options.num_frames, grain, limits)
    return grain


def generate(
    artifact: LoadedArtifact,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    max_sequence_length: int | None = None,
    offload: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> np.ndarray:
    """Frames (F, H, W, 3) uint8.

    Sizes that are None are the recipe's. The same seed gives the same first noise on every device,
    and on a CPU the same clip as diffusers' pipeline with a CPU generator.

    Args:
        height, width: in pixels.
        num_frames: 4·n + 1.
        offload: keep text encoder and VAE on the device only while they work.

    Raises:
        BadInput: the model takes no such size, is conditioned on images, or its text encoder and
            VAE are not there; before any work.
    """
    options = clip_options(
        artifact.manifest,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        max_sequence_length=max_sequence_length,
    )
    grain = check_clip(
        artifact.path, artifact.manifest, artifact.limits, options, artifact.components
    )
    pipeline, device = load_components(artifact), artifact.device

    progress("text", 0, 1)
    pipeline.text_encoder.to(device)
    embeds, negative_embeds = encode_text(artifact, prompt, options)
    if offload:
        pipeline.text_encoder.to("cpu")
    progress("text", 1, 1)

    generator = torch.Generator().manual_seed(seed)
    shape = (
        1,
        artifact.config["in_channels"],
        (options.num_frames - 1) // grain.temporal + 1,
        options.height // grain.spatial,
        options.width // grain.spatial,
    )
    latents = sample(
        artifact.transformers,
        artifact.schedule,
        embeds,
        negative_embeds,
        latents=initial_latents(artifact.schedule, shape, generator, device),
        generator=generator,
        progress=lambda done, total: progress("denoise", done, total),
    )

    progress("decode", 0, 1)
    pipeline.vae.to(device)
    frames = decode(pipeline, latents)
    if offload:
        pipeline.vae.to("cpu")
    progress("decode", 1, 1)
    return frames


@torch.no_grad()
def encode_text(
    artifact: LoadedArtifact, prompt: str, options: ClipOptions
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (1, max_sequence_length, C_text) of the prompt, and of the negative prompt where
    the schedule is guided."""
    embeds, negative_embeds = load_components(artifact).encode_prompt(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        do_classifier_free_guidance=artifact.schedule.evaluations > len(artifact.schedule.steps),
        max_sequence_length=options.max_sequence_length,
        device=artifact.device,
    )
    return embeds, negative_embeds


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 of the first clip in `latents`, by the pipeline's VAE.

    Raises:
        TurboOptError: a value of the clip is not finite.
    """
    vae = pipeline.vae
    latents = latents.to(vae.device, vae.dtype)
    mean, std = (
        torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1).to(latents)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0]
    if not video.isfinite().all():
        raise TurboOptError(
            "the decoded clip has values that are not finite: the latents had such, or the VAE "
            f"overflows in {vae.dtype}"
        )
    frames = pipeline.video_processor.postprocess_video(video, output_type="np")[0]
    return (frames * 255).round().astype(np.uint8)  # type: ignore[no-any-return]


def _check_text_only(path: Path, manifest: Manifest) -> None:
    pipeline_class = manifest.components.pipeline_class
    if pipeline_class != "WanPipeline":
        raise BadInput(
            f"{path}: a {pipeline_class} needs more than a prompt; use "
            "turbo_opt.load(path).as_pipeline() and call it as in diffusers, with image=... or "
            "video=..."
        )
