"""Make a set of samples: a teacher draws clips of captions, and their latents are kept.

Clips are kept as they come out of the sampling loop, before the VAE, which is what a student is
trained on. Each file is written whole; an interrupted run is continued by the same command. In
shards or not, a sample is first a file of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turbo_opt.artifact.staging import write_synced
from turbo_opt.calibration.components import encode_prompts, load_components
from turbo_opt.calibration.data.batches import generator_of
from turbo_opt.calibration.data.packing import SampleFiles
from turbo_opt.calibration.data.samples import (
    EMPTY_PROMPT,
    INDEX,
    MAKING,
    SampleIndex,
    padded_positions,
    used_positions,
    write_index,
    write_sample,
)
from turbo_opt.calibration.flow import Sampled
from turbo_opt.calibration.networks import DenoiserFolder, build_network, open_denoiser
from turbo_opt.calibration.places import LOCK, locked
from turbo_opt.calibration.training.world import World
from turbo_opt.capture.sampling import pipeline_schedule
from turbo_opt.errors import BadInput
from turbo_opt.runtime.limits import Granularity
from turbo_opt.runtime.sampler import initial_latents, sample

_ENCODED = 1024
"""Captions whose embeddings are in memory at once: some 2 GB of Wan's."""


@dataclass(frozen=True)
class Making:
    """How a set is made.

    Attributes:
        source: the teacher: `tiny-wan`, a diffusers folder or a hub id.
        height, width: in pixels.
        num_frames: 4·n + 1.
        num_inference_steps, guidance_scale, flow_shift, negative_prompt: of the teacher's sampler.
        text_length: positions that prompts are padded to.
        seed: of the first noise.
        compute_dtype: of products.
    """

    source: str
    height: int
    width: int
    num_frames: int
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float | None = None
    negative_prompt: str = ""
    text_length: int = 512
    seed: int = 0
    compute_dtype: str = "bfloat16"


def make_samples(
    making: Making,
    captions: Sequence[str],
    out: Path,
    world: World,
    *,
    batch: int = 1,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SampleIndex:
    """Draw one clip of each caption into `out`. All processes call; they share the captions.

    Args:
        batch: clips that are drawn at once.
        shard_size: samples of a tar shard; None for a file each.

    Raises:
        BadInput: the teacher needs more than text, the size does not fit it, `out` holds something
            else, or other processes are at it.
    """
    folder = open_denoiser(making.source, "transformer")
    shape = _latent_shape(folder, making)
    said = _checked(out, making, captions, shard_size)
    world.wait()  # for all to have looked before one writes
    with world.led_by_main(lambda: _held(out, said)):
        files = SampleFiles(out, captions, making.text_length, shard_size)
        missing = [number for number in range(len(captions)) if not files.holds(number)]
        world.wait()  # for all to have looked before the first writes
        own = missing[world.rank :: world.size]
        draw = None
        at_once = batch * max(1, _ENCODED // batch)
        for first in range(0, max(1, len(own)), at_once):
            some = own[first : first + at_once]
            texts = ["", making.negative_prompt, *(captions[number] for number in some)]
            empty, negative, *embeds = _encoded(folder, texts, making.text_length, world.device)
            if world.is_main and not first:
                write_sample(out / EMPTY_PROMPT, None, empty)
            if some and draw is None:
                draw = _Drawing(folder, making, shape, negative, world)
            for start in range(0, len(some), batch):
                assert draw is not None
                numbers, prompts = some[start : start + batch], embeds[start : start + batch]
                latents = draw(numbers, prompts)
                for number, clip, text in zip(numbers, latents, prompts, strict=True):
                    write_sample(files.own(number), clip, text)
                if world.is_main:
                    files.pack()
                progress(first + start + len(numbers), len(own))
        world.wait()
        if world.is_main:
            files.pack()
        index = SampleIndex(
            format=1,
            latents=shape,
            text_length=making.text_length,
            text_dim=empty.shape[-1],
            source=asdict(making),
            samples=files.records(),
        )
        if world.is_main:
            write_index(out, index)
        world.wait()
        return index


def _encoded(
    folder: DenoiserFolder, texts: Sequence[str], text_length: int, device: torch.device
) -> list[Tensor]:
    """Embeddings of prompts without their padding, each (T, C_text) float32 on the CPU. The text
    encoder is on the device meanwhile."""
    encoded = encode_prompts(load_components(folder), texts, text_length, device)
    return [used_positions(each).clone() for each in encoded]  # a view would keep the padding


def tiny_wan_captions(count: int, seed: int) -> list[str]:
    """Captions that tiny-wan was trained on, without those that are held out."""
    from turbo_opt.calibration.tiny_wan.clips import caption, sample_scenes

    return [caption(scene) for scene in sample_scenes(count, seed, split="train")]


class _Drawing:
    """The teacher and its sampling loop."""

    def __init__(
        self,
        folder: DenoiserFolder,
        making: Making,
        shape: tuple[int, int, int, int],
        negative: Tensor,
        world: World,
    ) -> None:
        self._making, self._shape, self._device = making, shape, world.device
        self._negative = self._padded(negative)
        self._schedule = pipeline_schedule(
            folder.pipeline.path,
            folder.pipeline.components,
            num_inference_steps=making.num_inference_steps,
            guidance_scale=making.guidance_scale,
            flow_shift=making.flow_shift,
        )
        # Each process draws clips of its own, so the networks are whole.
        alone = World(0, 1, world.device)
        dtype = getattr(torch, making.compute_dtype)
        self._networks = {}
        for name in folder.pipeline.denoisers:
            expert = open_denoiser(str(folder.pipeline.path), name)
            network = build_network(expert, alone)
            if dtype is torch.bfloat16:
                hold_operands(network, dtype)
            self._networks[name] = Sampled(network, expert.config, dtype)

    def __call__(self, numbers: Sequence[int], embeds: Sequence[Tensor]) -> Tensor:
        """Latents of the clips with these numbers, (B, C, F, H, W) on the CPU."""
        noise = [
            initial_latents(
                self._schedule, (1, *self._shape), generator_of(self._making.seed, number)
            )
            for number in numbers
        ]
        prompts = torch.stack([self._padded(each) for each in embeds])
        return sample(
            self._networks,
            self._schedule,
            prompts,
            self._negative.expand(len(numbers), -1, -1),
            latents=torch.cat(noise).to(self._device),
        ).cpu()

    def _padded(self, embeds: Tensor) -> Tensor:
        return padded_positions(embeds, self._making.text_length).to(self._device)


def hold_operands(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of products as autocast to `dtype` would cast them each time: results are
    the same bits, in half of the memory."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.to(dtype)


def _latent_shape(folder: DenoiserFolder, making: Making) -> tuple[int, int, int, int]:
    from turbo_opt.runtime.limits import LatentLimits, check_size

    grain = Granularity.of(folder.pipeline.path / "vae", folder.config)
    longest = int(folder.config.get("rope_max_seq_len", 1024))
    frames, height, width = (longest * patch for patch in grain.patch)
    limits = LatentLimits(frames, height, width)
    check_size(making.height, making.width, making.num_frames, grain, limits)
    return (
        int(folder.config["in_channels"]),
        (making.num_frames - 1) // grain.temporal + 1,
        making.height // grain.spatial,
        making.width // grain.spatial,
    )


def _checked(
    out: Path, making: Making, captions: Sequence[str], shard_size: int | None
) -> dict[str, Any]:
    """What the folder's set is made of, if it is free or an unfinished one of the same set."""
    said: dict[str, Any] = {**asdict(making), "captions": list(captions)}
    if shard_size is not None:
        said["shard_size"] = shard_size
    if (out / INDEX).is_file():
        raise BadInput(f"{out}: holds a set of samples already; choose another --out")
    if (out / MAKING).is_file():
        if json.loads((out / MAKING).read_text(encoding="utf-8")) != said:
            raise BadInput(
                f"{out}: holds an unfinished set that was made with other settings or captions; "
                "choose another --out"
            )
    elif os.path.lexists(out) and not (out.is_dir() and _is_free(out)):
        raise BadInput(f"{out}: exists and is no set of samples; choose another --out")
    return said


def _is_free(out: Path) -> bool:
    return all(item.name == LOCK for item in out.iterdir())


@contextlib.contextmanager
def _held(out: Path, said: Mapping[str, Any]) -> Iterator[None]:
    """Make the folder, say what its set is made of, and keep other processes out meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, "making samples"):
        temporary = out / f"{MAKING}.partial"
        write_synced(temporary, (json.dumps(said, indent=1) + "\n").encode())
        temporary.replace(out / MAKING)
        yield
