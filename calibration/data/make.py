"""Make a set of samples: clips that a teacher draws of captions, or videos with theirs.

Drawn clips are kept as they come out of the sampling loop, before the VAE, which is what a student
is trained on; videos as the VAE encodes them. Each file is written whole; an interrupted run is
continued by the same command. In shards or not, a sample is first a file of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_opt.artifact.staging import write_synced
from turbo_opt.calibration.components import encode_prompts, load_components
from turbo_opt.calibration.data.drawing import Drawing, Teacher
from turbo_opt.calibration.data.packing import SampleFiles
from turbo_opt.calibration.data.samples import (
    EMPTY_PROMPT,
    INDEX,
    MAKING,
    SampleIndex,
    used_positions,
    write_index,
    write_sample,
)
from turbo_opt.calibration.data.settings import Making
from turbo_opt.calibration.data.videos import Broken, Encoder, Encoding
from turbo_opt.calibration.networks import DenoiserFolder, open_denoiser
from turbo_opt.calibration.places import LOCK, locked
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput
from turbo_opt.runtime.limits import Granularity

_ENCODED = 1024
"""Captions whose embeddings are in memory at once: some 2 GB of Wan's."""
_Clips = Callable[[Sequence[int], Sequence[Tensor]], Sequence[Tensor | Broken]]
"""(numbers, embeddings of their captions) → latents (C, F, H, W), or why there are none."""


def draw_samples(
    drawing: Drawing,
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
    folder = open_denoiser(drawing.source, "transformer")
    shape = _latent_shape(folder, drawing)

    def teacher(negative: Tensor) -> _Clips:
        return Teacher(folder, drawing, shape, negative, world.device)

    return _make(
        folder, drawing, captions, out, world, teacher,
        shape=shape, negative=drawing.negative_prompt, batch=batch, shard_size=shard_size,
        progress=progress,
    )  # fmt: skip


def encode_samples(
    encoding: Encoding,
    videos: Sequence[tuple[Path, str]],
    out: Path,
    world: World,
    *,
    broken_share: float = 0.0,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SampleIndex:
    """Encode videos with their captions into `out`. All processes call; they share the videos.

    Args:
        videos: (path, caption), as `captioned_videos` has them.
        broken_share: of the videos that may be too short or damaged; the set is without them.
        shard_size: samples of a tar shard; None for a file each.

    Raises:
        BadInput: more of the videos are broken; or as `draw_samples` does.
    """
    folder = open_denoiser(encoding.source, "transformer")
    paths = [path for path, _ in videos]

    def encoder(negative: Tensor) -> _Clips:
        return Encoder(folder, encoding, paths, world.device)

    return _make(
        folder, encoding, [caption for _, caption in videos], out, world, encoder,
        shape=_latent_shape(folder, encoding), shard_size=shard_size, progress=progress,
        broken_share=broken_share, said={"videos": [str(path.absolute()) for path in paths]},
    )  # fmt: skip


def _make(
    folder: DenoiserFolder,
    making: Making,
    captions: Sequence[str],
    out: Path,
    world: World,
    start: Callable[[Tensor], _Clips],
    *,
    shape: tuple[int, int, int, int],
    negative: str = "",
    batch: int = 1,
    shard_size: int | None = None,
    broken_share: float = 0.0,
    said: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None],
) -> SampleIndex:
    """Make samples of captions by what `start` gives, called with the negative prompt's embeddings
    when the text encoder has left the device."""
    said = _checked(out, making, {"captions": list(captions), **(said or {})}, shard_size)
    world.wait()  # for all to have looked before one writes
    with world.led_by_main(lambda: _held(out, said)):
        files = SampleFiles(out, captions, making.text_length, shard_size)
        if world.is_main:
            files.try_broken_again()
        world.wait()  # for broken ones to be missing again
        missing = [number for number in range(len(captions)) if not files.holds(number)]
        world.wait()  # for all to have looked before the first writes
        own = missing[world.rank :: world.size]
        clips = None
        at_once = batch * max(1, _ENCODED // batch)
        for first in range(0, max(1, len(own)), at_once):
            some = own[first : first + at_once]
            texts = ["", negative, *(captions[number] for number in some)]
            empty, unwanted, *embeds = _encoded(folder, texts, making.text_length, world.device)
            if world.is_main and not first:
                write_sample(out / EMPTY_PROMPT, None, empty)
            if some and clips is None:
                clips = start(unwanted)
            for place in range(0, len(some), batch):
                assert clips is not None
                numbers, prompts = some[place : place + batch], embeds[place : place + batch]
                latents = clips(numbers, prompts)
                for number, clip, text in zip(numbers, latents, prompts, strict=True):
                    if isinstance(clip, Broken):
                        files.leave_out(number, clip.reason)
                        _check_share(files, broken_share)
                    else:
                        write_sample(files.own(number), clip, text)
                if world.is_main:
                    files.pack()
                progress(first + place + len(numbers), len(own))
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
        world.wait()  # for all to have seen what is broken
        if world.is_main:
            write_index(out, index)
            files.forget_broken()
        world.wait()
        return index


def _check_share(files: SampleFiles, broken_share: float) -> None:
    broken, total = files.broken(), len(files.captions)
    if len(broken) > broken_share * total or len(broken) == total:
        raise BadInput(
            f"{next(iter(broken.values()))} ({len(broken)} of {total} videos are broken; mend "
            "them and run the same command again, or allow for a larger --broken-share)"
        )


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
    out: Path, making: Making, made_of: Mapping[str, Any], shard_size: int | None
) -> dict[str, Any]:
    """What the folder's set is made of, if it is free or an unfinished one of the same set."""
    said: dict[str, Any] = {**asdict(making), **made_of}
    if shard_size is not None:
        said["shard_size"] = shard_size
    if (out / INDEX).is_file():
        raise BadInput(f"{out}: holds a set of samples already; choose another --out")
    if (out / MAKING).is_file():
        if json.loads((out / MAKING).read_text(encoding="utf-8")) != said:
            raise BadInput(
                f"{out}: holds an unfinished set that was made with other settings, captions or "
                "videos; choose another --out"
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
