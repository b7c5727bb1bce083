"""Videos of one's own as samples: which frames are taken, and what is left out."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from turbo_opt.calibration.data import videos
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.data.videos import Encoding, captioned_videos, read_clip
from turbo_opt.cli.main import cli
from turbo_opt.errors import BadInput
from turbo_opt.runtime.video import write_video

RECIPE = """\
schema_version: 1
model: {source: ./teacher, dtype: float32}
target: cpu
passes: [canonicalize]
generate: {height: 64, width: 64, num_frames: 5, fps: 8, max_sequence_length: 16}
"""
STEP = 25
"""From one frame's grey to the next one's."""


def greys(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frames that get lighter one by one."""
    levels = np.arange(count, dtype=np.uint8) * STEP
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def taking(**options: object) -> Encoding:
    size = {"height": 64, "width": 64, "num_frames": 5, "fps": 16.0}
    return Encoding(source="tiny-wan", **{**size, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "stored", "taken", "expected"),
    [
        (".mp4", 16, 16.0, [0, 1, 2, 3, 4]),
        (".mp4", 32, 16.0, [0, 2, 4, 6, 8]),
        (".mp4", 8, 16.0, [0, 0, 1, 1, 2]),
        (".mp4", 24, 16.0, [0, 1, 3, 4, 6]),
        (".mp4", 10, 16.0, [0, 0, 1, 1, 2]),
        (".gif", 10, 16.0, [0, 0, 1, 1, 2]),
        (".gif", 20, 10.0, [0, 2, 4, 6, 8]),
    ],
)
def test_frames_are_those_shown_at_their_times(tmp_path, suffix, stored, taken, expected) -> None:
    path = write_video(greys(10), tmp_path / f"clip{suffix}", fps=stored)
    clip = read_clip(path, taking(fps=taken))
    assert clip.shape == (5, 64, 64, 3)
    assert clip.dtype == np.uint8
    found = clip.mean((1, 2, 3)) / STEP
    assert found.round().astype(int).tolist() == expected
    assert abs(found - expected).max() < 0.15  # of H.264


def test_the_last_frame_is_shown_as_long_as_the_others(tmp_path) -> None:
    path = write_video(greys(5), tmp_path / "clip.mp4", fps=16)
    assert len(read_clip(path, taking())) == 5
    with pytest.raises(BadInput, match=r"clip.mp4: too short, 5 of 6 frames at 16 a second"):
        read_clip(path, taking(num_frames=6))


@pytest.mark.parametrize(("height", "width"), [(64, 192), (192, 64), (128, 128), (48, 64)])
def test_the_middle_of_frames_is_kept(tmp_path, height, width) -> None:
    frames = np.full((5, height, width, 3), 40, np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    frames[:, top : top + side, left : left + side] = 200
    path = write_video(frames, tmp_path / "clip.mp4")
    clip = read_clip(path, taking())
    assert clip.shape == (5, 64, 64, 3)
    assert clip[:, 4:-4, 4:-4].min() > 190


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_a_recording_on_its_side_is_turned(tmp_path, degrees) -> None:
    frames = np.zeros((5, 64, 128, 3), np.uint8)
    frames[:, :, :64] = 255  # left half
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(16))
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.set_display_rotation(degrees)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    upright = np.rot90(frames[0], degrees // 90)
    height, width, _ = upright.shape
    clip = read_clip(path, taking(height=height, width=width))
    assert abs(clip[0].astype(int) - upright).mean() < 8


def test_what_is_no_video_is_named(tmp_path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    with pytest.raises(BadInput, match=r"clip.mp4: not a video, or damaged"):
        read_clip(path, taking())


def test_captions_lie_beside_videos(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    for name in ("b/second.MP4", "a.webm", "notes.md", "b/._second.MP4"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("  a cat\non a surfboard\n")
    (tmp_path / "b" / "second.txt").write_text("a dog")
    found = captioned_videos(tmp_path)
    assert found == [
        (tmp_path / "a.webm", "a cat on a surfboard"),
        (tmp_path / "b" / "second.MP4", "a dog"),
    ]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(item) for item in arguments], prog_name="turbo-opt")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Path:
    path = home / "videos.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four videos; the second is too short, the last is cut off."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, count in enumerate((6, 3, 10, 10)):
        write_video(greys(count, 48, 80), folder / f"{number}.mp4", fps=8)
        (folder / f"{number}.txt").write_text(f"clip {number}")
    whole = (folder / "3.mp4").read_bytes()
    (folder / "3.mp4").write_bytes(whole[: len(whole) // 2])
    return folder


def encode(recipe: Path, clips: Path, out: Path, *more: object) -> Result:
    return invoke(
        *(
            "calibrate",
            "data",
            recipe,
            "--videos",
            clips,
            "--out",
            out,
            "--device",
            "cpu",
            "--json",
        ),
        *more,
    )


@pytest.mark.parametrize("shards", [(), ("--shard-size", 2)])
def test_videos_become_samples_as_the_vae_encodes_them(
    home: Path, recipe: Path, clips: Path, tmp_path: Path, shards: tuple[object, ...]
) -> None:
    from diffusers import WanPipeline

    out = tmp_path / "set"
    result = encode(recipe, clips, out, "--broken-share", 0.5, *shards)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) | {"samples": ""} == {
        "samples": "", "count": 2, "left_out": 2, "latents": [16, 2, 16, 16],
    }  # fmt: skip
    assert not list(out.glob("*.broken"))
    samples = SampleSet.open(out)
    assert [record.caption for record in samples.index.samples] == ["clip 0", "clip 2"]
    assert samples.index.source["fps"] == 8.0
    sample = samples.read(1)
    assert sample is not None
    pipeline = WanPipeline.from_pretrained(home / "teacher")
    frames = torch.from_numpy(read_clip(clips / "2.mp4", taking(fps=8.0)))
    x = frames.movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(x).latent_dist.mean
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    torch.testing.assert_close(sample.latents, (latents[0] - mean) / std, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(
            "clip 2", do_classifier_free_guidance=False, max_sequence_length=16
        )
    error = (sample.prompt_embeds - embeds[0]).norm() / embeds.norm()
    assert error < 0.02  # the text encoder is in bfloat16


def test_broken_videos_stop_the_set_which_goes_on_when_they_are_mended(
    recipe: Path, clips: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    result = encode(recipe, clips, out)
    assert result.exit_code == 2
    assert "1.mp4: too short, 3 of 5 frames at 8 a second (1 of 4 videos are" in result.stderr
    assert "--broken-share" in result.stderr
    assert not (out / "index.json").exists()
    first = (out / "000000.safetensors").stat().st_mtime_ns
    for number in (1, 3):
        shutil.copyfile(clips / "2.mp4", clips / f"{number}.mp4")
    result = encode(recipe, clips, out)
    assert result.exit_code == 0, result.output
    assert len(SampleSet.open(out).index.samples) == 4
    assert (out / "000000.safetensors").stat().st_mtime_ns == first


def test_a_packed_shard_keeps_what_it_left_out(
    recipe: Path, clips: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "set"
    read = videos.read_clip

    def stopped(path: Path, encoding: Encoding) -> np.ndarray:
        if path.stem == "3":
            raise KeyboardInterrupt
        return read(path, encoding)

    monkeypatch.setattr(videos, "read_clip", stopped)
    shards = ("--shard-size", 2, "--broken-share", 0.5)
    assert encode(recipe, clips, out, *shards).exit_code == 130
    assert (out / "shard-000000.tar").is_file()
    monkeypatch.setattr(videos, "read_clip", read)
    assert encode(recipe, clips, out, *shards).exit_code == 0
    files = [record.file for record in SampleSet.open(out).index.samples]
    assert files == ["shard-000000.tar/000000.safetensors", "shard-000001.tar/000002.safetensors"]


@pytest.mark.parametrize(
    ("kept", "arguments", "message"),
    [
        ("*", ["--captions", "captions.txt"], "videos have theirs beside them"),
        ("*", ["--count", 9], "clips holds 4 videos"),
        ("*.txt", [], "holds no videos (.avi, .gif"),
        ("*.mp4", [], "4 of 4 videos have no caption"),
        ("", [], "clips: no such folder"),
        ("*", ["--set", "generate.height=60"], "nearest: 56 or 64"),
    ],
)
def test_videos_that_cannot_be_used(
    recipe: Path, clips: Path, tmp_path: Path, kept: str, arguments: list[object], message: str
) -> None:
    chosen = set(clips.glob(kept)) if kept else set()
    for path in clips.iterdir():
        if path not in chosen:
            path.unlink()
    if not kept:
        clips.rmdir()
    out = tmp_path / "set"
    result = encode(recipe, clips, out, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not out.exists()


def test_a_set_of_broken_videos_alone_is_none(recipe: Path, clips: Path, tmp_path: Path) -> None:
    result = encode(recipe, clips, tmp_path / "set", "--broken-share", 1, "--count", 1)
    assert result.exit_code == 0
    for number in (0, 2):
        shutil.copyfile(clips / "1.mp4", clips / f"{number}.mp4")
    result = encode(recipe, clips, tmp_path / "other", "--broken-share", 1)
    assert result.exit_code == 2 and "4 of 4 videos are broken" in result.stderr
