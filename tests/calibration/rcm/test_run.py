"""Jobs from a teacher and samples to a student that `distill-steps` takes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.helpers.tiny_folder import shared_folder, tiny_program, write_tiny_folder
from tests.passes.exchanges import run
from turbo_opt.calibration.convert import read_weights
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.rcm.run import remarks, train_rcm
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.training.loop import Trainer
from turbo_opt.calibration.training.world import World
from turbo_opt.checkpoints.reader import read_network
from turbo_opt.checkpoints.student import declared_student
from turbo_opt.cli.main import cli
from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.ir.rcm import rcm_schedule

ALONE = World(0, 1, torch.device("cpu"))
JOB = """\
schema_version: 1
job: rcm
teacher: {source: TEACHER}
data: {folder: samples, held_out: 2}
rcm: {warm_up: 2, reverse: {student_every: 2, rollout_steps: 2}}
training: {steps: 6, batch: 2, rate: 1.0e-4, compute_dtype: float32}
save: {every: 3}
log: {every: 1, evaluate_every: 3}
"""
BY_DIFFERENCE = "rcm.forward.tangent=difference"
SPARSE = "sla={topk: 0.5, block_q: 64, block_k: 64}"


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def place(home: Path) -> Path:
    (home / "rcm.yaml").write_text(JOB.replace("TEACHER", str(shared_folder())))
    return home


def job_of(place: Path, *settings: str) -> RCMJob:
    return load_job(place / "rcm.yaml", RCMJob, settings)


def log(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def weights(model: Path) -> dict[str, torch.Tensor]:
    found = read_network(model / "transformer").tensors
    return {name: lazy.load() for name, lazy in found.items()}


@pytest.fixture(scope="module")
def distilled(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that also draws clips."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    clips = "samples={every: 6, prompts: [a red circle], num_inference_steps: 2, fps: 8}"
    train_rcm(job_of(place, clips), out, ALONE, progress=quiet)
    return out


def test_the_networks_take_turns_after_the_warm_up(distilled: Path) -> None:
    rows = log(distilled)[1:]
    students = [bool(row["forward"]) for row in rows]
    assert students == [True, True, False, True, False, True]
    assert [bool(row["reverse"]) for row in rows] == [False] * 3 + [True, False, True]
    assert [bool(row["fake"]) for row in rows] == [False, False, True, True, True, True]
    assert all(float(row["loss"]) > 0 for row in rows)


def test_the_student_says_that_it_is_one(distilled: Path) -> None:
    student = declared_student(read_network(distilled / "model" / "transformer"))
    assert student is not None
    assert (student.distillation, student.sigma_max) == ("rcm", 80.0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TurboOptError("values that are not finite"), "values that are not finite"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "the VAE needs more memory than is left on cpu; without `samples` the job does not "
            "need it",
        ),
    ],
)
def test_a_clip_that_cannot_be_drawn_is_left_out_and_said(
    place: Path, tmp_path: Path, error: Exception, reason: str
) -> None:
    clips = "samples={every: 2, prompts: [a red circle], num_inference_steps: 2, fps: 8}"
    job = job_of(place, clips, "training.steps=2", "rcm.reverse=null")

    said: list[str] = []

    def broken(*told: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("turbo_opt.calibration.components.decode", broken)
        train_rcm(job, tmp_path / "out", ALONE, progress=quiet, say=said.append)
    assert said == [f"no clip 0 of step 2: {reason}"]
    assert (tmp_path / "out" / "model").is_dir()
    assert not (tmp_path / "out" / "samples").exists()


def test_clips_are_drawn_in_the_students_steps(distilled: Path) -> None:
    from turbo_opt.runtime.video import read_video

    frames, _ = read_video(distilled / "samples" / "step-000006-0.mp4")
    assert frames.shape == (5, 64, 64, 3)


def test_distill_steps_takes_the_student(distilled: Path) -> None:
    after = run(
        tiny_program(), "distill-steps{weights=student steps=2}", student=distilled / "model"
    )
    assert after.schedule == rcm_schedule(2, 80.0, "sde")
    for name, value in weights(distilled / "model").items():
        torch.testing.assert_close(
            after.denoisers["transformer"].weights[name].load(), value.float()
        )


class Stopped(Exception):
    """What a kill is here."""


def train_until_stopped(job: RCMJob, out: Path, at: int, patch: pytest.MonkeyPatch) -> None:
    real = Trainer._train_step

    def until(trainer: Trainer, rate: float) -> dict[str, float]:
        if trainer.step == at:
            raise Stopped
        return real(trainer, rate)

    patch.setattr(Trainer, "_train_step", until)
    with pytest.raises(Stopped):
        train_rcm(job, out, ALONE, progress=quiet)
    patch.undo()


def test_a_stopped_job_ends_with_the_bits_of_one_that_was_not(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is sparse while it distils."""
    job = job_of(place, BY_DIFFERENCE, SPARSE, "save.asynchronous=false")
    train_rcm(job, tmp_path / "a", ALONE, progress=quiet)
    train_until_stopped(job, tmp_path / "b", 4, monkeypatch)
    report = train_rcm(job, tmp_path / "b", ALONE, resume=True, progress=quiet)
    assert (report["first_step"], report["steps"]) == (3, 6)
    expected, found = weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert all(value.any() for name, value in found.items() if ".proj_l." in name)
    assert sum(".proj_l." in name for name in found) == 2


def test_the_fake_score_learns_at_its_own_rate(place: Path, tmp_path: Path) -> None:
    train_rcm(job_of(place, "rcm.reverse.fake_rate=1e-9"), tmp_path / "out", ALONE, progress=quiet)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-000006"
    fake = read_weights(checkpoint, "fake", average=False)
    teacher = weights(shared_folder())
    for name, value in fake.items():
        torch.testing.assert_close(value, teacher[name].float(), rtol=0, atol=1e-9)
    student = read_weights(checkpoint, "student", average=False)
    assert not torch.equal(student["proj_out.weight"], teacher["proj_out.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([SPARSE], "no forward-mode derivative: set rcm.forward.tangent to 'difference'"),
        (["training.context_parallel=2"], "without its derivative: set rcm.forward.tangent"),
        (["rcm.warm_up=6"], "warm_up of 6 steps leaves none of training.steps, 6"),
        (["rcm.forward.tangent=jpv"], "did you mean 'jvp'"),
        (["rcm.sigma_max=10"], "rcm.sigma_max: must be"),
        (["rcm.guidance=3"], "guidance_scale"),
        (["rcm.reverse.rollout_steps=5"], "rollout_steps: must be"),
        (["samples={prompts: [a], guidance_scale: 5}"], "samples.guidance_scale"),
    ],
)
def test_faults_of_a_job_are_named(place: Path, settings: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        job_of(place, *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher.source=./nowhere"], "nowhere: no such folder"),
        (["teacher.source=./pair"], "has two denoisers; a student is sampled from pure noise"),
        (["student.start=teacher"], "different architectures: num_layers is 1 and 2"),
        (["data.folder=silent"], "silent/empty.safetensors: .* rcm.guidance_scale to 1, now 5"),
        (["data.held_out=8"], "none is left to train on"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    place: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    if not (place / "pair").exists():
        write_tiny_folder(place / "pair", experts=2)
        shutil.copytree(place / "samples", place / "silent")
        (place / "silent" / "empty.safetensors").unlink()
    with pytest.raises(BadInput, match=message):
        train_rcm(job_of(place, *settings), tmp_path / "out", ALONE, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_without_guidance_no_empty_prompt_is_needed(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "samples", tmp_path / "silent")
    (tmp_path / "silent" / "empty.safetensors").unlink()
    settings = ("rcm.guidance_scale=1", "training.steps=1", "rcm.reverse=null")
    job = job_of(place, *settings, f"data.folder={tmp_path / 'silent'}")
    assert train_rcm(job, tmp_path / "out", ALONE, progress=quiet)["steps"] == 1


def test_a_training_that_time_ends_within_the_warm_up_says_so(place: Path, tmp_path: Path) -> None:
    settings = ("training.minutes=1.0e-3", "training.steps=2000", "rcm.warm_up=1000")
    words = [word for setting in settings for word in ("--set", setting)]
    job = ["calibrate", "rcm", str(place / "rcm.yaml"), "--device", "cpu", *words]
    out = ("--out", str(tmp_path / "out"), "--json")
    result = CliRunner().invoke(cli, [*job, *out], prog_name="turbo-opt")
    assert result.exit_code == 0, result.stderr
    (note,) = json.loads(result.stdout)["notes"]
    steps = json.loads(result.stdout)["steps"]
    assert 0 < steps < 1000
    assert note.startswith(f"none of the {steps} steps trained the student by rcm's reverse term")
    assert "is step 1002, as rcm.warm_up is 1000" in note
    assert f"note: {note}" in result.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["notes"] == [note]


@pytest.mark.parametrize(
    ("settings", "steps", "noted"),
    [([], 3, True), ([], 4, False), (["rcm.reverse=null", "rcm.warm_up=9"], 1, False)],
)
def test_only_a_reverse_term_that_never_came_is_noted(
    place: Path, settings: list[str], steps: int, noted: bool
) -> None:
    """Two steps of warm-up, then the fake score's first, then the student's."""
    assert bool(remarks(job_of(place, *settings).rcm, steps)) == noted


def test_from_the_command_line(place: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", "rcm", str(place / "rcm.yaml"), "--device", "cpu"]

    def invoke(*more: str):
        return CliRunner().invoke(cli, [*arguments, *more], prog_name="turbo-opt")

    out = ("--out", str(tmp_path / "out"))
    first = invoke(*out, "--set", "training.steps=3")
    assert first.exit_code == 0, first.output
    assert "relative change" in first.stdout
    again = invoke(*out)
    assert again.exit_code == 2 and "--resume continues it" in again.stderr
    resumed = invoke(*out, "--resume", "--json")
    assert json.loads(resumed.stdout)["first_step"] == 3
    other = invoke(*out, "--resume", "--set", "rcm.sigma_max=120")
    assert other.exit_code == 2 and "rcm.sigma_max: 80.0 then, 120.0 now" in other.stderr
