"""The detectors: right on true clips, robust on bad ones, and not satisfied by wrong ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turbo_opt.calibration.tiny_wan.clips import Scene, render, sample_scenes
from turbo_opt.calibration.tiny_wan.detectors import (
    ATTRIBUTES,
    detect,
    detect_batch,
    score,
    score_batch,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(70, seed=11, split="held-out")


@pytest.fixture(scope="module")
def videos(scenes: list[Scene]) -> Tensor:
    return render(scenes)


def accuracy(videos: Tensor, wanted: list[Scene]) -> dict[str, float]:
    results = score_batch(videos, wanted)
    return {name: sum(each[name] for each in results) / len(results) for name in ATTRIBUTES}


def blurred(videos: Tensor, deviation: float) -> Tensor:
    offsets = torch.arange(-6.0, 7.0)
    kernel = torch.exp(-0.5 * (offsets / deviation).square())
    kernel = kernel / kernel.sum()
    frames = F.pad(videos.flatten(0, 2).unsqueeze(1), (6, 6, 6, 6), mode="replicate")
    frames = F.conv2d(F.conv2d(frames, kernel[None, None, None]), kernel[None, None, :, None])
    return frames.view_as(videos)


def test_true_clips_are_recognised(videos: Tensor, scenes: list[Scene]) -> None:
    assert min(accuracy(videos, scenes).values()) >= 0.99


def test_blurred_and_noisy_clips_are_recognised(videos: Tensor, scenes: list[Scene]) -> None:
    generator = torch.Generator().manual_seed(0)
    bad = blurred(videos, 1.5) + 0.1 * torch.randn(videos.shape, generator=generator)
    assert min(accuracy(bad, scenes).values()) >= 0.97


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("shape", "ring"),
        ("colour", "yellow"),
        ("motion", "moves right to left"),
        ("motion", "stays still"),
        ("motion", "grows"),
        ("background", "green"),
    ],
)
def test_a_wrong_attribute_alone_is_found_wrong(name: str, other: str) -> None:
    wanted = Scene("circle", "red", "moves left to right", "blue")
    drawn = Scene(**(vars(wanted) | {name: other}))
    result = score(render([drawn])[0], wanted)
    assert [key for key, right in result.items() if not right] == [name]


def test_an_empty_clip_shows_nothing_but_background() -> None:
    seen = detect(torch.full((3, 17, 96, 96), 2 * 128 / 255 - 1))
    assert (seen.background, seen.colour, seen.shape, seen.motion) == ("grey", None, None, None)


def test_noise_shows_no_shape() -> None:
    noise = torch.randn(2, 3, 17, 96, 96, generator=torch.Generator().manual_seed(0))
    assert [seen.shape for seen in detect_batch(noise)] == [None, None]


def test_a_crooked_motion_is_none() -> None:
    across = Scene("circle", "red", "moves left to right", "blue")
    down = Scene("circle", "red", "moves down", "blue")
    video = torch.cat([render([across])[0, :, :9], render([down])[0, :, 9:]], dim=1)
    assert detect(video).motion is None


def test_videos_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, F, H, W\)"):
        detect_batch(torch.zeros(1, 17, 3, 96, 96))
