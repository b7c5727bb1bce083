"""Frames into files and back: H.264 in mp4, animated GIF, PNG contact sheet."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from turbo_opt.errors import BadInput

_SHEET_FRAMES = 16


def write_video(frames: np.ndarray, path: Path | str, fps: float = 16.0) -> Path:
    """Write a clip; the file appears whole or not at all.

    Args:
        frames: (F, H, W, 3) uint8.
        path: ends in `.mp4` (H.264; odd sides are padded by one pixel), `.gif`, or `.png` (a
            contact sheet of at most 16 frames).
        fps: frames per second.

    Raises:
        BadInput: another suffix, frames of another shape, or a folder that is not there.
    """
    path = Path(path).expanduser()
    writers: dict[str, Callable[[np.ndarray, Path, float], None]] = {
        ".mp4": _write_mp4,
        ".gif": _write_gif,
        ".png": _write_sheet,
    }
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise BadInput(
            f"{path}: cannot write {path.suffix or 'no suffix'!r}; use .mp4, .gif or .png"
        )
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise BadInput(f"frames must be (F, H, W, 3) uint8, got {frames.dtype} {frames.shape}")
    if not 0 < fps <= 1000:
        raise BadInput(f"fps = {fps}: must be above 0 and at most 1000")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} does not exist")
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writer(frames, partial, fps)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_video(path: Path | str) -> tuple[np.ndarray, float]:
    """(frames (F, H, W, 3) uint8, frames per second) of a video file.

    Raises:
        BadInput: it is no video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            return np.stack(frames), float(stream.average_rate or 0)
    except (OSError, IndexError, ValueError, av.error.FFmpegError) as error:
        raise BadInput(f"{path}: not a video ({error})") from None


def contact_sheet(frames: np.ndarray, count: int = _SHEET_FRAMES) -> np.ndarray:
    """At most `count` evenly spaced frames in a grid, (H·rows, W·columns, 3)."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]
    columns = math.ceil(math.sqrt(len(chosen)))
    rows = math.ceil(len(chosen) / columns)
    _, height, width, _ = chosen.shape
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, frame in enumerate(chosen):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    import av

    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "17"}
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def _write_gif(frames: np.ndarray, path: Path, fps: float) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
    )


def _write_sheet(frames: np.ndarray, path: Path, fps: float) -> None:
    from PIL import Image

    Image.fromarray(contact_sheet(frames)).save(path)
