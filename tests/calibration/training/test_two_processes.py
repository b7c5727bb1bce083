"""Two processes compute what one does, however they share the work; FSDP2 and Ulysses over gloo."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.sla.run import train_sla
from turbo_opt.calibration.training.world import World

ROOT = Path(__file__).parents[3]


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def train_alone(home: Path, out: Path, *settings: str, resume: bool = False) -> None:
    job = load_job(home / "job.yaml", SLAJob, settings)
    world = World(0, 1, torch.device("cpu"))
    train_sla(job, out, world, resume=resume, progress=lambda *told: None)


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`alone`, `data` and `context`: the same job on one process, on two, and on two."""
    out = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *(str(script), str(home), str(out)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train_alone(home, out / "alone")
    return out


@pytest.mark.parametrize("shared", ["data", "context"])
def test_losses_and_gradients_are_those_of_one_process(trained: Path, shared: str) -> None:
    alone, together = log(trained / "alone"), log(trained / shared)
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for one, two in zip(alone, together, strict=True):
        for column in ("loss", "gradient_norm", "held_out_loss"):
            assert bool(one[column]) == bool(two[column])
            if one[column]:
                assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-3)


@pytest.mark.parametrize("shared", ["data", "context"])
def test_the_model_is_whole(trained: Path, shared: str) -> None:
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    alone, together = load_file(trained / "alone" / file), load_file(trained / shared / file)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert value.shape == together[name].shape
        if "proj_l" not in name:  # starts at 0, where Adam turns rounding into whole steps
            torch.testing.assert_close(value, together[name], rtol=0.05, atol=2e-3)


def test_a_checkpoint_of_two_processes_is_resumed_by_one(home: Path, trained: Path) -> None:
    train_alone(home, trained / "data", "training.steps=6", resume=True)
    assert [row["step"] for row in log(trained / "data")][-2:] == ["5", "6"]
