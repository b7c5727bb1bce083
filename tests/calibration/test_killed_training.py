"""A training that is killed, in a step or in a save, ends with the weights of one that was not."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from turbo_opt.calibration.training.checkpoints import read_record
from turbo_opt.cli.main import cli

STEPS, EVERY = 12, 4
WEIGHTS = Path("model", "transformer", "diffusion_pytorch_model.safetensors")
_LONGEST_WAIT = 120


def arguments(home: Path, out: Path, *flags: str) -> list[str]:
    """The command of a training that saves in the background and evaluates at its ends only."""
    settings = {
        "training.steps": STEPS,
        "training.average": 0.9,
        "save.every": EVERY,
        "log.evaluate_every": 1000,
    }
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = ["calibrate", "sla", home / "job.yaml", "--out", out, "--device", "cpu"]
    return [*map(str, command), *changes, *flags]


def finish(*command: str) -> None:
    result = CliRunner().invoke(cli, list(command), prog_name="turbo-opt")
    assert result.exit_code == 0, result.output


def rows(out: Path) -> list[dict[str, str]]:
    with contextlib.suppress(FileNotFoundError), (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))
    return []


def saved_step(out: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    with contextlib.suppress(FileNotFoundError):
        return int((out / "checkpoints" / "latest").read_text().rpartition("-")[2])
    return 0


def partial(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".step-*.partial"))


def between_saves(out: Path) -> bool:
    """Whether a step has been done since the newest checkpoint."""
    saved = saved_step(out)
    return saved > 0 and not partial(out) and f"{saved + 1}" in [row["step"] for row in rows(out)]


def in_a_save(out: Path) -> bool:
    """Whether a checkpoint is being written while an older one is there."""
    return saved_step(out) > 0 and bool(partial(out))


def hold_at(process: subprocess.Popen[str], out: Path, moment: Callable[[Path], bool]) -> None:
    """Stop the process where it is at a moment; the test fails if that does not come."""
    end = time.monotonic() + _LONGEST_WAIT
    while process.poll() is None and time.monotonic() < end:
        if moment(out):
            process.send_signal(signal.SIGSTOP)
            if moment(out):  # still: what was seen may have passed before the signal came
                return
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.kill()
    pytest.fail(f"{moment.__name__} did not come: {process.communicate()[1]}")


def start(command: list[str]) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(root)}
    return subprocess.Popen(
        [sys.executable, "-m", "turbo_opt", *command],
        cwd=root,
        env=os.environ | threads,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_training_resumes_from_a_whole_checkpoint_to_the_same_weights(
    home: Path, tmp_path: Path
) -> None:
    straight, stepping, saving = (tmp_path / name for name in ("straight", "stepping", "saving"))
    finish(*arguments(home, straight))
    expected = load_file(straight / WEIGHTS)
    losses = [(row["step"], row["loss"]) for row in rows(straight)]
    assert [int(step) for step, _ in losses] == [*range(STEPS + 1)]

    process = start(arguments(home, saving))
    hold_at(process, saving, between_saves)
    shutil.copytree(saving, stepping)  # what a kill here would leave
    process.send_signal(signal.SIGCONT)
    hold_at(process, saving, in_a_save)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert between_saves(stepping) and in_a_save(saving)

    for out in (stepping, saving):
        saved = saved_step(out)
        assert read_record(out / "checkpoints" / f"step-{saved:06d}")["step"] == saved < STEPS
        assert not (out / "model").exists()
        finish(*arguments(home, out, "--resume"))
        assert not partial(out) and saved_step(out) == STEPS
        assert [(row["step"], row["loss"]) for row in rows(out)] == losses
        found = load_file(out / WEIGHTS)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, found[name]), name
