"""Text encoder, tokenizer and VAE of a pipeline, and the clips that a network makes with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from turbo_opt.calibration.data.batches import generator_of
from turbo_opt.calibration.flow import Sampled
from turbo_opt.calibration.jobs.schema import Samples
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.calibration.places import Say
from turbo_opt.calibration.training.world import World
from turbo_opt.capture.sampling import pipeline_schedule
from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.ir.schedule import Schedule
from turbo_opt.runtime.generate import decode
from turbo_opt.runtime.sampler import initial_latents, sample
from turbo_opt.runtime.video import write_video


def load_components(folder: DenoiserFolder) -> Any:
    """The diffusers pipeline without denoisers, on the CPU: text in bfloat16, VAE in float32.

    Raises:
        BadInput: diffusers cannot read it.
    """
    import diffusers

    path = folder.pipeline.path
    absent = dict.fromkeys(folder.pipeline.denoisers)
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    try:
        with warnings.catch_warnings():
            # `torch_dtype` is what every diffusers knows; newer ones would rather read `dtype`.
            warnings.simplefilter("ignore", FutureWarning)
            return diffusers.WanPipeline.from_pretrained(
                path, torch_dtype=dtypes, local_files_only=True, **absent
            )
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: diffusers cannot read it as a WanPipeline ({error})") from error


@torch.no_grad()
def encode_prompts(
    components: Any, prompts: Iterable[str], text_length: int, device: torch.device
) -> Iterator[Tensor]:
    """Embeddings of one prompt after another, (text_length, C_text) float32 on the CPU, zero
    beyond the prompt's end."""
    components.text_encoder.to(device)
    for prompt in prompts:
        embeds, _ = components.encode_prompt(
            prompt=prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=text_length,
            device=device,
        )
        yield embeds[0].float().cpu()


def check_draws(folder: DenoiserFolder) -> None:
    """Raise BadInput if a denoiser cannot draw clips by itself."""
    if len(folder.pipeline.denoisers) > 1:
        raise BadInput(
            f"samples: {folder.pipeline.path} has two denoisers, and one alone draws no clips; "
            "leave samples out"
        )


class Preview:
    """Draws the clips of a job's `samples` with the network as it is.

    Args:
        folder: the teacher's.
        settings: what to draw.
        out: folder of the clips, `step-000100-0.mp4` and so on.
        latents: (C, F, H, W) of the data.
        text_length: positions that prompts are padded to.
        compute: dtype of products.
        schedule: the steps of a clip; None for those of the teacher's own sampler.
        say: told of a clip that could not be drawn.
    """

    def __init__(
        self,
        folder: DenoiserFolder,
        settings: Samples,
        out: Path,
        latents: tuple[int, int, int, int],
        text_length: int,
        compute: torch.dtype,
        world: World,
        schedule: Schedule | None,
        say: Say,
    ) -> None:
        self._folder, self._settings, self._out, self._say = folder, settings, out, say
        self._latents, self._compute, self._world = latents, compute, world
        self._components = load_components(folder)
        texts = [*settings.prompts, ""]
        encoded = encode_prompts(self._components, texts, text_length, world.device)
        embeds = torch.stack(list(encoded)).to(world.device)
        self._embeds, self._negative = embeds[:-1], embeds[-1:]
        self._components.text_encoder = None
        self._schedule = schedule or pipeline_schedule(
            folder.pipeline.path,
            folder.pipeline.components,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )

    def __call__(self, step: int, network: nn.Module) -> Mapping[str, float]:
        """Draw all clips; all processes call, as a sharded network needs them. Returns `detected`,
        the share of right attributes, where the prompts are captions of tiny-wan."""
        scores: list[bool] = []
        denoisers = {
            self._folder.name: Sampled(network, self._folder.config, self._compute),
        }
        for index in range(len(self._settings.prompts)):
            generator = generator_of(self._settings.seed, index)
            noise = initial_latents(
                self._schedule, (1, *self._latents), generator, self._world.device
            )
            latents = sample(
                denoisers,
                self._schedule,
                self._embeds[index : index + 1],
                self._negative,
                latents=noise,
                generator=generator,
            )
            if self._world.is_main:
                scores += self._written(latents, step, index)
        # In every process: a log that had a row in one of them alone would wait for the others.
        shares = torch.tensor([sum(scores), len(scores)], dtype=torch.float32)
        right, judged = self._world.sum(shares.to(self._world.device)).tolist()
        return {"detected": right / judged} if judged else {}

    def _written(self, latents: Tensor, step: int, index: int) -> list[bool]:
        """Write a clip, unless it cannot be drawn; returns which attributes of its caption are
        right."""
        vae, refusal = self._components.vae, None
        try:  # the training is judged by its loss
            vae.to(self._world.device)
            frames = decode(self._components, latents)
        except TurboOptError as error:
            refusal = str(error)
        except torch.OutOfMemoryError:
            refusal = (
                f"the VAE needs more memory than is left on {self._world.device}; without "
                "`samples` the job does not need it"
            )
        if refusal is not None:
            # Here, as the error holds on to what was computed; the VAE itself to earlier frames.
            vae.clear_cache()
            vae.to("cpu")
            torch.cuda.empty_cache()
            self._say(f"no clip {index} of step {step}: {refusal}")
            return []
        self._out.mkdir(parents=True, exist_ok=True)
        clip = self._out / f"step-{step:06d}-{index}.mp4"
        write_video(frames, clip, self._settings.fps)
        return _detected(frames, self._settings.prompts[index])


def _detected(frames: np.ndarray, prompt: str) -> list[bool]:
    """Which attributes of a tiny-wan caption a clip shows; none for another prompt."""
    from turbo_opt.calibration.tiny_wan.clips import SIZE, parse_caption
    from turbo_opt.calibration.tiny_wan.detectors import score

    try:
        wanted = parse_caption(prompt)
    except ValueError:
        return []
    if frames.shape[1:3] != (SIZE, SIZE):
        return []
    return list(score(torch.from_numpy(frames).movedim(-1, 0).float() / 127.5 - 1, wanted).values())
