"""tiny-wan's students: what they learn from, the jobs that train them, what is kept."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.latents import denormalise
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.tiny_wan import students, whole_clip
from turbo_opt.calibration.tiny_wan.clips import held_out, parse_caption
from turbo_opt.calibration.tiny_wan.detectors import score
from turbo_opt.calibration.tiny_wan.evaluate import load_pipeline
from turbo_opt.calibration.tiny_wan.samples import draw_samples
from turbo_opt.capture.folder import find_source
from turbo_opt.embedded import embedded
from turbo_opt.errors import TurboOptError

CPU = torch.device("cpu")


def test_drawn_samples_are_clips_of_their_captions(tmp_path: Path) -> None:
    pipeline = load_pipeline(find_source("tiny-wan"), CPU)
    index = draw_samples(pipeline, 2, 0, tmp_path, batch=1)
    samples = SampleSet.open(tmp_path)
    assert len(samples) == 2 and index.latents == (16, 5, 24, 24)
    for number, record in enumerate(index.samples):
        sample = samples.read(number)
        assert sample is not None and sample.prompt_embeds.shape == (512, 128)
        assert not torch.equal(sample.prompt_embeds, samples.empty_prompt())
        wanted = parse_caption(record.caption)
        assert not held_out(wanted)
        with torch.no_grad():
            latents = denormalise(pipeline.vae, sample.latents[None])
            assert all(score(whole_clip.decode(pipeline.vae, latents)[0], wanted).values())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("consistency", RCMJob), ("rcm", RCMJob), ("sla", SLAJob), ("rcm-sla", RCMJob)],
)
def test_the_jobs_take_the_settings_of_a_run(name, kind, tmp_path: Path) -> None:
    settings = students.StudentTraining(minutes=4.0, batch=32)
    job = load_job(students.job_file(name), kind, settings.overrides(name, tmp_path))
    assert job.training.minutes == pytest.approx(4.0 * students._SHARES[name])
    assert job.training.batch == 32 and job.path(job.data.folder) == tmp_path
    steps = students.StudentTraining(steps=3)
    job = load_job(students.job_file(name), kind, steps.overrides(name, tmp_path))
    assert (job.training.steps, job.training.minutes) == (3, None)


def test_the_shares_of_the_minutes_are_all_of_them() -> None:
    assert sum(students._SHARES.values()) == pytest.approx(1.0)


def write_student(work: Path, name: str, size: int = 4) -> None:
    file = work / name / students._WEIGHTS
    file.parent.mkdir(parents=True)
    notes = {"format": "pt", "turbo_opt": f"made in {work}", "distillation": "rcm"}
    save_file({"weight": torch.full((size,), float(len(name)))}, file, metadata=notes)
    (work / name / "log.csv").write_text("step\n")


@pytest.fixture
def jobs(monkeypatch) -> dict[str, list[str | None]]:
    """Replaces the trainings by ones that only write; `fails` names one that stops."""
    started: dict[str, list[str | None]] = {"starts": [], "fails": []}

    def train(job, out: Path, world, *, progress):
        if out.name in started["fails"]:
            raise TurboOptError("the loss is not finite")
        start = job.student.start
        if job.job == "sla" and out.name != students.SOLVED:
            assert [Path(each.source).parent.name for each in job.companions] == ["rcm"]
        started["starts"].append(f"{out.name} from {start and Path(start).parent.name}")
        write_student(out.parent, out.name)
        return {"after": {"held_out_loss": 0.1 if out.name == students.CLOSED_FORM else 0.2}}

    monkeypatch.setattr(students, "train_sla", train)
    monkeypatch.setattr(students, "train_rcm", train)
    monkeypatch.setattr(students, "solve_sla", train)
    monkeypatch.setattr(students, "draw_samples", lambda *said: None)
    return started


def test_students_start_from_each_other_and_the_better_tuned_one_is_kept(tmp_path, jobs) -> None:
    sizes = students.train_students(
        students.StudentTraining(steps=1), tmp_path, tmp_path / "out", CPU
    )
    assert jobs["starts"] == [
        "consistency from None",
        "rcm from consistency",
        "sla from None",
        "closed-form from None",
        "sla-closed-form from closed-form",
        "rcm-sla from sla-closed-form",
    ]
    files = ["consistency", "rcm-sla", "rcm", "sla"]
    assert sorted(sizes) == sorted([*(f"{name}.safetensors" for name in files), "logs.tar"])
    with safe_open(tmp_path / "out" / "sla.safetensors", framework="pt") as file:
        assert float(file.get_tensor("weight")[0]) == len(students.CLOSED_FORM)
        assert file.metadata() == {"format": "pt", "distillation": "rcm"}


@pytest.mark.parametrize("place", ["out", "finished"], ids=["elsewhere", "in place"])
def test_finished_students_are_taken_over(tmp_path, jobs, place) -> None:
    finished = tmp_path / "finished"
    finished.mkdir()
    shipped = load_file(embedded("tiny-wan-rcm"))
    for name in ("consistency", "rcm"):
        save_file(shipped, finished / f"{name}.safetensors", metadata={"distillation": "rcm"})
    work, out = tmp_path / "work", tmp_path / place
    students.train_students(students.StudentTraining(steps=1), work, out, CPU, finished)
    assert jobs["starts"] == [
        "sla from None",
        "closed-form from None",
        "sla-closed-form from closed-form",
        "rcm-sla from sla-closed-form",
    ]
    assert (out / "rcm.safetensors").read_bytes() == (finished / "rcm.safetensors").read_bytes()
    assert load_file(work / "rcm" / students._WEIGHTS).keys() == shipped.keys()


def test_a_job_that_fails_leaves_what_the_others_made(tmp_path, jobs) -> None:
    jobs["fails"].append(students.SLA)
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(TurboOptError, match="not finite"):
        students.train_students(students.StudentTraining(steps=1), tmp_path, tmp_path / "out", CPU)
    assert torch.get_float32_matmul_precision() == precision
    with tarfile.open(tmp_path / "out" / "logs.tar") as archive:
        assert sorted(archive.getnames()) == ["consistency/log.csv", "rcm/log.csv"]
    assert (tmp_path / "out" / "rcm.safetensors").is_file()


def test_a_student_that_is_too_large_to_ship_is_an_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rcm.safetensors").write_bytes(bytes(2**18))
    monkeypatch.setattr(students, "MAX_FILE_MEBIBYTES", 0.2)
    with pytest.raises(ValueError, match=r"files over 0.2 MiB cannot ship.*rcm.safetensors"):
        students._sizes(tmp_path)
