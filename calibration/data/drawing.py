"""Clips that a teacher draws: its sampling loop, before the VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.batches import generator_of
from turbo_opt.calibration.data.samples import padded_positions
from turbo_opt.calibration.data.settings import Making
from turbo_opt.calibration.flow import Sampled
from turbo_opt.calibration.networks import DenoiserFolder, build_network, open_denoiser
from turbo_opt.calibration.training.world import World
from turbo_opt.capture.sampling import pipeline_schedule
from turbo_opt.runtime.sampler import initial_latents, sample


@dataclass(frozen=True, kw_only=True)
class Drawing(Making):
    """How clips are drawn.

    Attributes:
        num_inference_steps, guidance_scale, flow_shift, negative_prompt: of the teacher's sampler.
        seed: of the first noise.
        compute_dtype: of products.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float | None = None
    negative_prompt: str = ""
    seed: int = 0
    compute_dtype: str = "bfloat16"


class Teacher:
    """The teacher and its sampling loop; each process draws clips of its own, so the networks are
    whole.

    Args:
        shape: (C, F, H, W) of latents.
        negative: (T, C_text) embeddings of the negative prompt.
    """

    def __init__(
        self,
        folder: DenoiserFolder,
        drawing: Drawing,
        shape: tuple[int, int, int, int],
        negative: Tensor,
        device: torch.device,
    ) -> None:
        self._drawing, self._shape, self._device = drawing, shape, device
        self._negative = self._padded(negative)
        self._schedule = pipeline_schedule(
            folder.pipeline.path,
            folder.pipeline.components,
            num_inference_steps=drawing.num_inference_steps,
            guidance_scale=drawing.guidance_scale,
            flow_shift=drawing.flow_shift,
        )
        alone = World(0, 1, device)
        dtype = getattr(torch, drawing.compute_dtype)
        self._networks = {}
        for name in folder.pipeline.denoisers:
            expert = open_denoiser(str(folder.pipeline.path), name)
            network = build_network(expert, alone)
            if dtype is torch.bfloat16:
                hold_operands(network, dtype)
            self._networks[name] = Sampled(network, expert.config, dtype)

    def __call__(self, numbers: Sequence[int], embeds: Sequence[Tensor]) -> list[Tensor]:
        """Latents of the clips with these numbers, each (C, F, H, W) on the CPU."""
        noise = [
            initial_latents(
                self._schedule, (1, *self._shape), generator_of(self._drawing.seed, number)
            )
            for number in numbers
        ]
        prompts = torch.stack([self._padded(each) for each in embeds])
        latents = sample(
            self._networks,
            self._schedule,
            prompts,
            self._negative.expand(len(numbers), -1, -1),
            latents=torch.cat(noise).to(self._device),
        )
        return list(latents.cpu())

    def _padded(self, embeds: Tensor) -> Tensor:
        return padded_positions(embeds, self._drawing.text_length).to(self._device)


def hold_operands(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of products as autocast to `dtype` would cast them each time: results are
    the same bits, in half of the memory."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.to(dtype)
