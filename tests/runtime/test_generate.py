"""A prompt becomes a clip: the one that diffusers makes, checked before any work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import turbo_opt
from tests.helpers.tiny_folder import (
    TINY_RECIPE,
    reference_pipeline,
    shared_artifact,
    shared_folder,
    tiny_program,
    write_tiny_folder,
)
from turbo_opt.artifact.load import LoadedArtifact
from turbo_opt.artifact.save import save
from turbo_opt.capture import capture
from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.runtime.generate import clip_options, decode
from turbo_opt.runtime.limits import Granularity, LatentLimits, check_size

PROMPT, NEGATIVE = "a red circle moves", "blue square"


@pytest.fixture(scope="module")
def artifact() -> LoadedArtifact:
    return turbo_opt.load(shared_artifact())


@pytest.mark.parametrize("experts", [1, 2])
def test_frames_equal_those_of_diffusers_for_the_same_seed(experts: int) -> None:
    frames = turbo_opt.load(shared_artifact(experts)).generate(
        PROMPT, negative_prompt=NEGATIVE, seed=7
    )
    expected = reference_pipeline(shared_folder(experts))(
        PROMPT, NEGATIVE, height=32, width=48, num_frames=5, num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
    ).frames[0]  # fmt: skip
    assert frames.dtype == np.uint8
    assert frames.shape == (5, 32, 48, 3)
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))


def test_a_timestep_per_token_gives_the_frames_of_diffusers(tmp_path: Path) -> None:
    folder = write_tiny_folder(
        tmp_path / "ti2v", transformer={"num_layers": 1}, expand_timesteps=True
    )
    program = capture(str(folder), dtype="float32", num_inference_steps=2)
    out = save(program, tmp_path / "a", recipe=TINY_RECIPE, replay=False)
    frames = turbo_opt.load(out).generate(PROMPT, seed=7)
    expected = reference_pipeline(folder)(
        PROMPT, height=32, width=48, num_frames=5, num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
    ).frames[0]  # fmt: skip
    assert np.array_equal(frames, (expected * 255).round().astype(np.uint8))


def test_latents_that_are_not_finite_are_no_black_clip(artifact: LoadedArtifact) -> None:
    latents = torch.zeros(1, artifact.config["in_channels"], 2, 4, 6)
    assert decode(artifact.as_pipeline(), latents).ndim == 4
    latents[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(TurboOptError, match="values that are not finite"):
        decode(artifact.as_pipeline(), latents)


def test_another_seed_or_size_gives_another_clip(artifact: LoadedArtifact) -> None:
    first, second = (artifact.generate(PROMPT, seed=seed) for seed in (1, 2))
    assert not np.array_equal(first, second)
    assert artifact.generate(PROMPT, height=16, width=24, num_frames=1).shape == (1, 16, 24, 3)


def test_sizes_come_from_the_call_then_the_recipe_then_480p(artifact: LoadedArtifact) -> None:
    options = clip_options(artifact.manifest, width=64, height=None)
    assert (options.width, options.height, options.fps) == (64, 32, 8.0)
    assert options.max_sequence_length == 512


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 30}, "height = 30: must be a multiple of 8.*nearest: 24 or 32"),
        ({"width": 3}, "width = 3: .*nearest: 8$"),
        ({"width": 10**6}, "at most 4096; nearest: 4096$"),
        ({"num_frames": 6}, r"num_frames = 6: must be 4·n \+ 1.*nearest: 5 or 9"),
        ({"num_frames": 0}, "nearest: 1$"),
        ({"num_frames": 9999}, "at most 1021; nearest: 1021$"),
    ],
)
def test_an_illegal_size_names_the_nearest_legal_ones(
    artifact: LoadedArtifact, size: dict[str, int], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        artifact.generate(PROMPT, **size)


def test_sizes_of_wan_are_legal() -> None:
    grain, limits = Granularity(8, 4, (1, 2, 2)), LatentLimits(256, 1024, 1024)
    for width, height in ((832, 480), (480, 832), (1280, 720), (960, 960), (640, 640)):
        check_size(height, width, 81, grain, limits)


def test_progress_names_text_denoise_and_decode(artifact: LoadedArtifact) -> None:
    seen: list[Any] = []
    artifact.generate(PROMPT, progress=lambda *step: seen.append(step), offload=True)
    assert seen[:2] == [("text", 0, 1), ("text", 1, 1)]
    assert seen[2:5] == [("denoise", 1, 3), ("denoise", 2, 3), ("denoise", 3, 3)]
    assert seen[5:] == [("decode", 0, 1), ("decode", 1, 1)]


def test_missing_components_say_how_to_name_them(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shared_folder(), tmp_path / "moved"))
    program = tiny_program()
    program.components = type(program.components)(str(folder), "WanPipeline", {})
    out = save(program, tmp_path / "a", recipe=TINY_RECIPE, replay=False)
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"load\(path, components=\.\.\.\)"):
        turbo_opt.load(out).generate(PROMPT)
    assert turbo_opt.load(out, components=moved).generate(PROMPT).shape == (5, 32, 48, 3)


def test_an_image_conditioned_model_points_to_its_pipeline(tmp_path: Path) -> None:
    program = tiny_program()
    program.components = type(program.components)("x", "WanImageToVideoPipeline", {})
    artifact = turbo_opt.load(save(program, tmp_path / "a", replay=False))
    with pytest.raises(BadInput, match=r"WanImageToVideoPipeline needs more.*as_pipeline\(\)"):
        artifact.generate(PROMPT)
