"""Clips of held-out captions by any network, from the same first noise, and what they show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.students.variants import Variant
from turbo_opt.calibration.data.samples import padded_positions
from turbo_opt.calibration.latents import denormalise
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.calibration.tiny_wan import whole_clip
from turbo_opt.calibration.tiny_wan.architecture import TEXT_LENGTH
from turbo_opt.calibration.tiny_wan.clips import captions_of, sample_scenes
from turbo_opt.calibration.tiny_wan.detectors import ATTRIBUTES, score_batch
from turbo_opt.calibration.tiny_wan.evaluate import load_pipeline, starting_noise
from turbo_opt.calibration.tiny_wan.samples import draw_samples, encode_captions
from turbo_opt.capture.sampling import pipeline_schedule
from turbo_opt.ir.rcm import SIGMA_MAX, rcm_schedule
from turbo_opt.ir.schedule import Schedule
from turbo_opt.runtime.sampler import sample

_GUIDANCE = 4.0


class HeldOutClips:
    """Draws clips of held-out captions with the networks that it is given.

    Args:
        folder: tiny-wan, whose text encoder and VAE all clips share.
        count: clips; combinations are repeated evenly, each time in other words.
        batch: clips that are sampled at once.
        seed: of captions and noise.

    Attributes:
        scenes: what the clips should show.
        captions: how many different captions say so.
    """

    def __init__(
        self, folder: DenoiserFolder, device: torch.device, count: int, batch: int, seed: int = 0
    ) -> None:
        self._device, self._batch, self._seed = device, batch, seed
        self._pipeline = load_pipeline(folder.pipeline.path, device)
        self.scenes = sample_scenes(count, seed, split="held-out")
        captions = captions_of(self.scenes)
        self.captions = len(set(captions))
        embeds = encode_captions(self._pipeline, ["", *dict.fromkeys(captions)])
        padded = {text: padded_positions(value, TEXT_LENGTH) for text, value in embeds.items()}
        self._prompts = torch.stack([padded[text] for text in captions]).to(device)
        self._empty = padded[""].to(device)
        self._noise = starting_noise(count, seed)

    @torch.no_grad()
    def draw(self, networks: Mapping[str, Any], schedule: Schedule, *, guided: bool) -> Tensor:
        """Videos (B, 3, F, H, W) in [-1, 1], one of each caption.

        Args:
            networks: the denoisers that the schedule names.
        """
        videos = []
        for start in range(0, len(self._prompts), self._batch):
            prompts = self._prompts[start : start + self._batch]
            noise = self._noise[start : start + self._batch].to(self._device, schedule.dtype)
            latents = sample(
                networks,
                schedule,
                prompts,
                self._empty.expand_as(prompts) if guided else None,
                latents=noise * schedule.initial_noise_scale,
                generator=torch.Generator(self._device).manual_seed(self._seed + start),
            )
            vae = self._pipeline.vae
            videos += [
                whole_clip.decode(vae, denormalise(vae, part)).clamp(-1, 1)
                for part in latents.split(64)
            ]
        return torch.cat(videos)

    def draw_training_samples(self, count: int, out: Path) -> None:
        """A set to learn from, of clips drawn by formula of captions that are not held out."""
        draw_samples(self._pipeline, count, self._seed, out)

    def shares_right(self, videos: Tensor) -> dict[str, float]:
        """Which share of the clips shows each attribute of its caption, and `all_right`."""
        right = score_batch(videos, [scene.combination for scene in self.scenes])
        shares = {name: sum(each[name] for each in right) / len(right) for name in ATTRIBUTES}
        return {**shares, "all_right": sum(all(each.values()) for each in right) / len(right)}


def schedule_of(variant: Variant, folder: DenoiserFolder) -> Schedule:
    """The steps that a row is sampled in: the teacher's sampler's if guided, else rCM's."""
    if not variant.guided:
        return rcm_schedule(variant.steps, SIGMA_MAX, "sde")
    pipeline = folder.pipeline
    return pipeline_schedule(
        pipeline.path,
        pipeline.components,
        num_inference_steps=variant.steps,
        guidance_scale=_GUIDANCE,
    )
