"""Clips that are drawn on the way: what several processes agree on, and what a failure leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.calibration.conftest import LATENTS, TEXT_LENGTH
from turbo_opt.calibration.components import Preview
from turbo_opt.calibration.jobs.schema import Samples
from turbo_opt.calibration.networks import build_network, open_denoiser
from turbo_opt.calibration.training.world import World

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue square")


@pytest.fixture(scope="module")
def network(home: Path) -> nn.Module:
    return build_network(open_denoiser(str(home / "teacher"), "transformer"), World(0, 1, CPU))


def preview(home: Path, out: Path, world: World, said: list[str]) -> Preview:
    folder = open_denoiser(str(home / "teacher"), "transformer")
    settings = Samples(prompts=PROMPTS, num_inference_steps=1)
    return Preview(
        folder, settings, out, LATENTS, TEXT_LENGTH, torch.float32, world, None, said.append
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_are_given_what_the_main_one_saw(
    home: Path, tmp_path: Path, network: nn.Module, monkeypatch, rank: int
) -> None:
    """One that alone had a row to log would wait for the others forever."""
    frames, seen = np.zeros((5, 64, 64, 3), np.uint8), iter([[True, False], [False, False]])
    own: list[torch.Tensor] = []
    monkeypatch.setattr("turbo_opt.calibration.components.decode", lambda *given: frames)
    monkeypatch.setattr("turbo_opt.calibration.components._detected", lambda *given: next(seen))

    def total(world: World, value: torch.Tensor) -> torch.Tensor:
        own.append(value)
        return torch.tensor([1.0, 4.0])

    monkeypatch.setattr(World, "sum", total)
    assert preview(home, tmp_path, World(rank, 2, CPU), [])(1, network) == {"detected": 0.25}
    assert [each.tolist() for each in own] == [[0.0, 0.0] if rank else [1.0, 4.0]]


def test_a_clip_that_does_not_fit_into_memory_leaves_nothing_there(
    home: Path, tmp_path: Path, network: nn.Module, monkeypatch
) -> None:
    def fill(pipeline: Any, latents: torch.Tensor) -> np.ndarray:
        vae = pipeline.vae
        vae._feat_map = [torch.zeros(1)]  # earlier frames, as the VAE keeps them
        vaes.append(vae)
        raise torch.OutOfMemoryError

    vaes: list[Any] = []
    said: list[str] = []
    monkeypatch.setattr("turbo_opt.calibration.components.decode", fill)
    assert preview(home, tmp_path / "out", World(0, 1, CPU), said)(3, network) == {}
    assert not any(kept is not None for vae in vaes for kept in vae._feat_map)
    assert [text.partition(":")[0] for text in said] == [
        f"no clip {index} of step 3" for index in range(2)
    ]
    assert "without `samples` the job does not need it" in said[0]
