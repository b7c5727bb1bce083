"""The shipped H200 recipe of the embedded model, from the command line, on a GPU."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import turbo_opt
from turbo_opt.cli.main import main

pytestmark = pytest.mark.gpu


def test_run_verify_and_generate_draw_what_the_caption_says(tmp_path):
    from turbo_opt.calibration.tiny_wan.clips import Scene
    from turbo_opt.calibration.tiny_wan.detectors import score

    artifact = tmp_path / "artifact"
    recipe = "tiny-wan/h200" if torch.cuda.get_device_capability() >= (8, 9) else "tiny-wan/cpu"
    runner = CliRunner()
    result = runner.invoke(main, ["run", recipe, "--out", str(artifact), "--no-cache"])
    assert result.exit_code == 0, result.output
    result = runner.invoke(main, ["verify", str(artifact), "--device", "cuda"])
    assert result.exit_code == 0, result.output
    loaded = turbo_opt.load(artifact, device="cuda")
    assert loaded.device.type == "cuda"
    frames = loaded.generate("a red circle moves left to right on a blue background", seed=0)
    scene = Scene("circle", "red", "moves left to right", "blue")
    video = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert all(score(video, scene).values())
