"""The shipped H200 recipe of the embedded model, from the command line, on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import turbo_opt

pytestmark = pytest.mark.gpu


def command_line(*args):
    result = subprocess.run(
        [sys.executable, "-m", "turbo_opt", *args], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_run_verify_and_generate_draw_what_the_caption_says(tmp_path):
    from turbo_opt.calibration.tiny_wan.clips import Scene
    from turbo_opt.calibration.tiny_wan.detectors import score

    artifact = tmp_path / "artifact"
    recipe = "tiny-wan/h200" if torch.cuda.get_device_capability() >= (8, 9) else "tiny-wan/cpu"
    command_line("run", recipe, "--out", str(artifact), "--no-cache")
    command_line("verify", str(artifact), "--device", "cuda")
    loaded = turbo_opt.load(artifact, device="cuda")
    assert loaded.device.type == "cuda"
    frames = loaded.generate("a red circle moves left to right on a blue background", seed=0)
    scene = Scene("circle", "red", "moves left to right", "blue")
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert all(score(video, scene).values())
