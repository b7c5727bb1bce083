"""The folder of a job: one training at a time, nothing lost, and nothing begun without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.calibration.conftest import write_samples
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.places import JOB, job_folder
from turbo_opt.cli.main import cli
from turbo_opt.errors import BadInput


@pytest.fixture
def job(home: Path) -> SLAJob:
    return load_job(home / "job.yaml", SLAJob)


def invoke(home: Path, out: Path, *flags: object) -> Result:
    words = ["calibrate", "sla", home / "job.yaml", "--out", out, "--device", "cpu", *flags]
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="turbo-opt")


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--closed-form",)])
def test_a_second_training_is_kept_out_of_a_folder_while_the_first_runs(
    home: Path, tmp_path: Path, job: SLAJob, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    with job_folder(out, job, resume=False):
        before = (out / JOB).read_text()
        second = invoke(home, out, *flags)
        assert second.exit_code == 2
        assert f"{out}: another process is training there" in second.stderr
        assert (out / JOB).read_text() == before
    assert not (out / "log.csv").exists()
    with job_folder(out, job, resume=True):  # let go of by then
        pass


def test_a_folder_that_was_let_go_of_by_a_failure_is_free(tmp_path: Path, job: SLAJob) -> None:
    with pytest.raises(ZeroDivisionError), job_folder(tmp_path / "out", job, resume=False):
        raise ZeroDivisionError
    said: list[str] = []
    with job_folder(tmp_path / "out", job, resume=False, say=said.append):
        assert "saved no checkpoint; this run begins at the first step" in said[0]


def test_a_file_system_without_locks_is_said(tmp_path: Path, job: SLAJob, monkeypatch) -> None:
    def refuse(*told: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    said: list[str] = []
    with job_folder(tmp_path / "out", job, resume=False, say=said.append):
        pass
    assert ["cannot lock files" in text for text in said] == [True]


def test_bad_data_before_the_first_checkpoint_can_be_mended_and_the_command_repeated(
    home: Path, tmp_path: Path
) -> None:
    clips, out = write_samples(tmp_path / "clips"), tmp_path / "out"
    for number in range(6):  # what is seen when it is read, and not before
        shutil.copyfile(clips / "empty.safetensors", clips / f"{number:06d}.safetensors")
    flags = ("--set", f"data.folder={clips}", "--set", "training.steps=1")
    bad = invoke(home, out, *flags)
    assert bad.exit_code == 2 and "samples are broken" in bad.stderr
    (out / "notes.txt").write_text("mine")
    shutil.rmtree(clips)
    write_samples(clips)
    again = invoke(home, out, *flags)
    assert again.exit_code == 0, again.stderr
    assert f"{out}: the job there has saved no checkpoint" in again.stderr
    assert (out / "notes.txt").read_text() == "mine" and (out / "model").is_dir()
    third = invoke(home, out, *flags)
    assert third.exit_code == 2 and "holds a job already" in third.stderr


@pytest.mark.parametrize("left", ["model/x", "report.json"])
def test_a_result_without_a_checkpoint_is_nothing_to_go_on_from(
    tmp_path: Path, job: SLAJob, left: str
) -> None:
    """As --closed-form leaves it; a training that began again would replace it."""
    out = tmp_path / "out"
    with job_folder(out, job, resume=False):
        pass
    (out / left).parent.mkdir(exist_ok=True)
    (out / left).write_text("made")
    said = f"holds {left.partition('/')[0]} and no checkpoint to go on from, as --closed-form"
    with pytest.raises(BadInput, match=said), job_folder(out, job, resume=True):
        pass
    assert (out / left).read_text() == "made"


@pytest.mark.parametrize("left", ["checkpoints/step-000003/x", "model/x", "report.json"])
def test_what_an_earlier_job_has_made_is_not_taken_over(
    tmp_path: Path, job: SLAJob, left: str
) -> None:
    out = tmp_path / "out"
    with job_folder(out, job, resume=False):
        (out / left).parent.mkdir(parents=True, exist_ok=True)
        (out / left).touch()
    other = job.model_copy(update={"description": "another"})
    with pytest.raises(BadInput, match="holds a job already"), job_folder(out, other, resume=False):
        pass
    assert json.loads((out / JOB).read_text())["description"] == ""


def test_a_job_file_of_the_users_own_is_never_replaced(tmp_path: Path, job: SLAJob) -> None:
    (tmp_path / JOB).write_text("mine")
    for _ in range(2):  # what the first try leaves must not open the folder to the second
        with pytest.raises(BadInput, match="holds a job"), job_folder(tmp_path, job, resume=False):
            pass
    assert (tmp_path / JOB).read_text() == "mine"


@pytest.mark.parametrize("made", [False, True])
def test_nothing_is_resumed_where_nothing_is(home: Path, tmp_path: Path, made: bool) -> None:
    out = tmp_path / "out"
    if made:
        out.mkdir()
    result = invoke(home, out, "--resume")
    assert result.exit_code == 2
    assert f"{out}: holds no job to go on with; leave --resume out" in result.stderr
    assert out.exists() == made and not (made and any(out.iterdir()))


def test_a_resume_without_a_checkpoint_says_that_it_begins(home, tmp_path, job) -> None:
    with job_folder(tmp_path / "out", job, resume=False):
        pass
    result = invoke(home, tmp_path / "out", "--resume", "--set", "training.steps=1", "--json")
    assert result.exit_code == 0, result.stderr
    assert "saved no checkpoint; this run begins at the first step" in result.stderr
    assert json.loads(result.stdout)["first_step"] == 0
