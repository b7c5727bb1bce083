"""Clips are written whole, in the format that the name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from turbo_opt.errors import BadInput
from turbo_opt.runtime.video import contact_sheet, read_video, write_video


def _clip(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square that moves over a gradient."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[..., 1] = np.linspace(0, 200, width).astype(np.uint8)
    for index in range(frames):
        clip[index, 8:16, 4 + 4 * index : 12 + 4 * index] = (250, 40, 40)
    return clip


def test_an_mp4_reads_back_as_the_same_clip(tmp_path: Path) -> None:
    frames, fps = read_video(write_video(_clip(), tmp_path / "clip.mp4", fps=12))
    assert (frames.shape, fps) == ((6, 32, 48, 3), 12.0)
    error = np.abs(frames.astype(int) - _clip().astype(int))
    assert error.mean() < 8


def test_odd_sides_are_padded_for_h264(tmp_path: Path) -> None:
    path = write_video(_clip(height=31, width=47), tmp_path / "clip.mp4")
    assert read_video(path)[0].shape == (6, 32, 48, 3)


def test_broken_frame_rates_are_kept(tmp_path: Path) -> None:
    path = write_video(_clip(), tmp_path / "clip.mp4", fps=24000 / 1001)
    assert read_video(path)[1] == pytest.approx(23.976, abs=1e-3)


def test_a_gif_holds_every_frame(tmp_path: Path) -> None:
    with Image.open(write_video(_clip(), tmp_path / "clip.gif", fps=10)) as image:
        assert (getattr(image, "n_frames", 1), image.size) == (6, (48, 32))


def test_a_png_is_a_contact_sheet(tmp_path: Path) -> None:
    with Image.open(write_video(_clip(81), tmp_path / "clip.png")) as image:
        assert image.size == (4 * 48, 4 * 32)
    assert contact_sheet(_clip(3)).shape == (64, 96, 3)


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    for name in ("clip.avi", "clip"):
        with pytest.raises(BadInput, match=r"use \.mp4, \.gif or \.png"):
            write_video(_clip(), tmp_path / name)


def test_frames_of_another_shape_or_dtype_are_refused(tmp_path: Path) -> None:
    for frames in (_clip()[0], _clip().astype(np.float32), _clip()[:0], _clip()[..., :1]):
        with pytest.raises(BadInput, match=r"\(F, H, W, 3\) uint8"):
            write_video(frames, tmp_path / "clip.mp4")
    with pytest.raises(BadInput, match="fps = 0"):
        write_video(_clip(), tmp_path / "clip.mp4", fps=0)


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(_clip(), tmp_path / "clip.gif")
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="fire"):
        write_video(_clip(3), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["clip.gif"]


def test_something_else_than_a_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(BadInput, match=r"x\.mp4: not a video"):
        read_video(tmp_path / "x.mp4")
