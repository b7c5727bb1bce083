"""Two processes compute what one does, however they share the work; FSDP2 and Ulysses over gloo."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import JOB, ROUTER_JOB, write_samples, write_teacher
from tests.calibration.training.two_processes import DISCRETE, THREE
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.rcm.run import train_rcm
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.sla.run import solve_sla, train_sla
from turbo_opt.calibration.sla2.run import train_router
from turbo_opt.calibration.sla2.schema import RouterJob
from turbo_opt.calibration.training.world import World

ROOT = Path(__file__).parents[3]


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


RCM_JOB = """\
schema_version: 1
job: rcm
teacher: {source: ./teacher}
data: {folder: samples, held_out: 2}
rcm: {warm_up: 1, reverse: {student_every: 2, rollout_steps: 2}}
training: {steps: 3, batch: 2, rate: 1.0e-4, compute_dtype: float32}
save: {every: 100}
log: {every: 1, evaluate_every: 3}
"""
UNSAVED = JOB.replace("save: {every: 3}", "save: {every: 100}")
"""Checkpoints are read of `data` alone."""
TWO_STEPS = UNSAVED.replace("steps: 4", "steps: 2")
SPOILED = (3, 4)
ALONE = World(0, 1, torch.device("cpu"))


def quiet(*told: object) -> None:
    """No progress."""


def train_alone(
    home: Path, out: Path, *settings: str, resume: bool = False, job: str = "job"
) -> None:
    settled = load_job(home / f"{job}.yaml", SLAJob, settings)
    train_sla(settled, out, ALONE, resume=resume, progress=quiet)


def spoil(samples: Path) -> None:
    """One file less, which both processes see, and a sample for each that only it draws in the
    first step."""
    (samples / "000000.safetensors").unlink()
    for number in SPOILED:
        path = samples / f"{number:06d}.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "latents": tensors["latents"] * torch.nan}, path)


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same jobs on one process and on two.

    `alone`, `data` and `context` tune for SLA, `companion alone` and `companion` in turns with
    another model and with an average of the weights; `router alone` and `router` are stage 1 of
    SLA2, `routed alone` and `routed` stage 2. `rcm alone` and `rcm` distil, and so do `discrete
    alone` and `discrete`, along the teacher's path by differences.
    """
    out = tmp_path_factory.mktemp("two")
    # An average that is evaluated after each step must not stay in the place of the weights.
    averaged_router = ROUTER_JOB.replace("rate: 0.02", "rate: 0.02, average: 0.5")
    router_job = averaged_router.replace("evaluate_every: 6", "evaluate_every: 1")
    router_job = router_job.replace("steps: 6", "steps: 3").replace("every: 3", "every: 100")
    (home / "router.yaml").write_text(router_job)
    other = write_teacher(out / "other", seed=1)
    averaged = TWO_STEPS.replace("rate: 3.0e-4", "rate: 3.0e-4, average: 0.5")
    companion = f"companions: [{{source: {other}, noise: {{low: 0.5}}}}]\n"
    (home / "companion.yaml").write_text(averaged + companion)
    (home / "rcm.yaml").write_text(RCM_JOB)
    (home / "unsaved.yaml").write_text(UNSAVED)
    start = (
        f"mode: sla2, topk: 0.5, block_q: 64, block_k: 64}}\nstudent: {{start: {out}/start/model}}"
    )
    (home / "routed.yaml").write_text(
        TWO_STEPS.replace("topk: 0.5, block_q: 64, block_k: 64}", start)
    )
    router = load_job(home / "router.yaml", RouterJob)
    train_router(router, out / "router alone", ALONE, progress=quiet)
    (out / "start").symlink_to(out / "router alone")
    spoil(write_samples(home / "broken"))
    broken = UNSAVED.replace("folder: samples", "folder: broken")
    (home / "broken.yaml").write_text(broken.replace("steps: 4, batch: 2", "steps: 1, batch: 4"))
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
    solve_sla(
        load_job(home / "job.yaml", SLAJob, THREE), out / "solved alone", ALONE, progress=quiet
    )
    train_alone(home, out / "alone", job="unsaved")
    train_alone(home, out / "companion alone", job="companion")
    train_alone(home, out / "routed alone", job="routed")
    for name, settings in (("rcm", []), ("discrete", DISCRETE)):
        distilled = load_job(home / "rcm.yaml", RCMJob, settings)
        train_rcm(distilled, out / f"{name} alone", ALONE, progress=quiet)
    return out


PAIRS = [("alone", "data"), ("alone", "context")]
PAIRS += [("companion alone", "companion"), ("router alone", "router"), ("routed alone", "routed")]
PAIRS += [("rcm alone", "rcm"), ("discrete alone", "discrete")]
each_pair = pytest.mark.parametrize(("one", "two"), PAIRS, ids=[pair[1] for pair in PAIRS])


@each_pair
def test_losses_and_gradients_are_those_of_one_process(trained: Path, one: str, two: str) -> None:
    alone, together = log(trained / one), log(trained / two)
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for expected, found in zip(alone, together, strict=True):
        for column in ("loss", "gradient_norm", "held_out_loss"):
            assert bool(expected[column]) == bool(found[column])
            if expected[column]:
                assert float(expected[column]) == pytest.approx(float(found[column]), rel=1e-3)


@each_pair
def test_the_model_is_whole(trained: Path, one: str, two: str) -> None:
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    alone, together = (load_file(trained / name / file) for name in (one, two))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert value.shape == together[name].shape
        if "proj_l" not in name:  # starts at 0, where Adam turns rounding into whole steps
            torch.testing.assert_close(value, together[name], rtol=0.05, atol=2e-3)


def test_a_closed_form_of_three_clips_is_the_same_on_two_processes(trained: Path) -> None:
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    alone, together = (load_file(trained / f"solved{who}" / file) for who in (" alone", ""))
    projections = [name for name in alone if "proj_l.weight" in name]
    assert projections
    for name in projections:
        difference = (alone[name] - together[name]).norm() / alone[name].norm()
        assert difference < 1e-2, name


def test_a_checkpoint_of_two_processes_is_resumed_by_one(
    home: Path, trained: Path, tmp_path: Path
) -> None:
    """The fourth step, made from the checkpoint of the third, is that of one process that was not
    stopped; the held-out loss after it shows the moments, too."""
    shutil.copytree(trained / "data", tmp_path / "data")
    checkpoints = tmp_path / "data" / "checkpoints"
    assert len(list((checkpoints / "step-000003").glob("*.distcp"))) == 2
    (checkpoints / "latest").write_text("step-000003\n")
    train_alone(home, tmp_path / "data", resume=True)
    expected, found = log(trained / "alone")[-1], log(tmp_path / "data")[-1]
    assert expected["step"] == found["step"] == "4"
    # Float32 rounds by 6e-8, in another order on two processes, in each of three steps before;
    # seen are 5e-7.
    for column in ("loss", "gradient_norm", "held_out_loss"):
        assert float(found[column]) == pytest.approx(float(expected[column]), rel=5e-6), column


def test_what_the_main_process_refuses_all_refuse(trained: Path) -> None:
    for rank in range(2):
        said = (trained / f"refused-{rank}.txt").read_text()
        assert said.startswith(f"{trained / 'data'}: holds a job already")


def test_a_training_that_diverged_stops_all_processes(trained: Path) -> None:
    for rank in range(2):
        said = (trained / f"diverged-{rank}.txt").read_text()
        assert said.startswith("the student's weights, or their squares, are not finite after step")
    assert not (trained / "diverged" / "model").exists()


def test_broken_samples_are_those_of_all_processes_each_once(trained: Path) -> None:
    """Three of eight, of which no process has found more than two by itself."""
    report = json.loads((trained / "broken-0.5" / "report.json").read_text())
    assert report["broken_samples"] == 3
    assert log(trained / "broken-0.5")[-1]["broken_samples"] == "3"


def test_a_share_of_broken_samples_is_that_of_all_processes(trained: Path) -> None:
    for rank in range(2):
        said = (trained / f"broken-{rank}.txt").read_text()
        assert "at least 3 of 8 samples are broken, data.broken_share allows 25%" in said
    assert not (trained / "broken-0.25" / "model").exists()


def test_weights_of_one_process_that_are_not_finite_are_known_to_all(trained: Path) -> None:
    for rank in range(2):
        assert (trained / f"finite-{rank}.txt").read_text() == "[True, False]"
