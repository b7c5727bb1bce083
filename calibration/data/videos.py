"""Clips of a folder of videos: their captions, their frames, and what the VAE makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbo_opt.calibration.components import load_components
from turbo_opt.calibration.data.settings import Making
from turbo_opt.calibration.latents import normalise
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.errors import BadInput

SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
_CAPTION = ".txt"


@dataclass(frozen=True, kw_only=True)
class Encoding(Making):
    """How videos are encoded.

    Attributes:
        fps: frames a second that are taken of each, from its beginning on.
    """

    fps: float = 16.0


@dataclass(frozen=True)
class Broken:
    """A video that gave no sample, and why."""

    reason: str


def captioned_videos(folder: Path) -> list[tuple[Path, str]]:
    """(video, caption) of all videos in a folder and below, in the order of their names.

    The caption of `clip.mp4` is the text of `clip.txt` beside it, in one line.

    Raises:
        BadInput: there is no video, or one has no caption.
    """
    if not folder.is_dir():
        raise BadInput(f"--videos {folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if _is_video(path))
    if not paths:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise BadInput(f"--videos {folder}: holds no videos ({suffixes})")
    captions = [_caption(path) for path in paths]
    if without := [path for path, caption in zip(paths, captions, strict=True) if not caption]:
        raise BadInput(
            f"{len(without)} of {len(paths)} videos have no caption, {without[0]} the first; "
            f"{without[0].with_suffix(_CAPTION).name} beside it is to say what it shows"
        )
    return list(zip(paths, captions, strict=True))


def _is_video(path: Path) -> bool:
    """By its name; hidden files are what systems leave beside the files of others."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _caption(video: Path) -> str:
    path = video.with_suffix(_CAPTION)
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_clip(path: Path, encoding: Encoding) -> np.ndarray:
    """The first frames of a video, (num_frames, height, width, 3) uint8, `fps` a second.

    Frames are scaled to cover the clip, and what sticks out is cut off on both sides alike. A
    recording that says how it is to be turned is turned.

    Raises:
        BadInput: it is no video, or too short.
    """
    import av

    size = encoding.height, encoding.width
    try:
        with av.open(str(path)) as container:
            shown = _at_rate(container, encoding.fps, encoding.num_frames)
            frames = [_covering(frame, *size) for frame in shown]
    except (OSError, IndexError, ValueError, av.error.FFmpegError) as error:
        raise BadInput(f"{path}: not a video, or damaged ({error})") from None
    if len(frames) < encoding.num_frames:
        raise BadInput(
            f"{path}: too short, {len(frames)} of {encoding.num_frames} frames at "
            f"{encoding.fps:g} a second"
        )
    return np.stack(frames)


def _at_rate(container: Any, fps: float, count: int) -> Iterator[Any]:
    """At most `count` frames, the k-th being what is shown k / fps after the first."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    shown, first, taken = None, None, 0
    length = float(1 / stream.average_rate) if stream.average_rate else 1 / fps
    time = 0.0
    for frame in container.decode(stream):
        stamp = frame.time if frame.time is not None else time + length
        first = stamp if first is None else first
        time = stamp - first
        while shown is not None and taken < count and _before(taken / fps, time):
            yield shown
            taken += 1
        if taken == count:
            return
        shown = frame
    while shown is not None and taken < count and _before(taken / fps, time + length):
        yield shown
        taken += 1


def _before(one: float, other: float) -> bool:
    """By more than the rounding of time stamps, which are whole milliseconds in some files."""
    return one < other - 2e-3


def _covering(frame: Any, height: int, width: int) -> np.ndarray:
    """(height, width, 3) of the middle of a frame."""
    quarters = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise
    high, wide = (width, height) if quarters % 2 else (height, width)
    scale = max(high / frame.height, wide / frame.width)
    scaled = (math.ceil(frame.height * scale - 1e-6), math.ceil(frame.width * scale - 1e-6))
    pixels = frame.reformat(
        height=scaled[0], width=scaled[1], format="rgb24", interpolation="LANCZOS"
    ).to_ndarray()
    top, left = (scaled[0] - high) // 2, (scaled[1] - wide) // 2
    return np.rot90(pixels[top : top + high, left : left + wide], quarters)


class Encoder:
    """The VAE of a teacher, which encodes one video after another.

    Args:
        paths: of all videos of the set, by number.
    """

    def __init__(
        self,
        folder: DenoiserFolder,
        encoding: Encoding,
        paths: Sequence[Path],
        device: torch.device,
    ) -> None:
        self._encoding, self._paths = encoding, paths
        self._vae = load_components(folder).vae.to(device)

    def __call__(self, numbers: Sequence[int], embeds: Sequence[Tensor]) -> list[Tensor | Broken]:
        """Latents of these videos, each (C, F, H, W) on the CPU, as the denoiser sees them."""
        return [self._encoded(self._paths[number]) for number in numbers]

    @torch.no_grad()
    def _encoded(self, path: Path) -> Tensor | Broken:
        try:
            frames = read_clip(path, self._encoding)
        except BadInput as error:
            return Broken(str(error))
        vae = self._vae
        video = torch.from_numpy(frames).to(vae.device).movedim(-1, 0)[None]
        encoded = vae.encode(video.to(vae.dtype) / 127.5 - 1).latent_dist.mode()
        latents = normalise(vae, encoded)[0].cpu()
        return latents if latents.isfinite().all() else Broken(f"{path}: latents are not finite")
