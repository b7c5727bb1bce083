"""tiny-wan's students, by the jobs that any model is trained with (`jobs/*.yaml`).

    consistency        four steps, no guidance, by rCM's forward term alone
    rcm                from there, by both terms
    sla                the teacher with sparse-linear attention, from proj_l = 0
    sla-closed-form    the same, from proj_l solved in closed form
    rcm-sla            consistency with sparse-linear attention, from the better of the last two

`merge-weights` adds what `sla` learned to `rcm` when a recipe is compiled, so the merged student
needs no training and no file of its own; `rcm-sla` is what it is measured against.
"""

from __future__ import annotations

import contextlib
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turbo_opt.calibration.flow import tensor_float
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.places import JOB, MODEL, REPORT, Report
from turbo_opt.calibration.rcm.run import train_rcm
from turbo_opt.calibration.rcm.schema import RCMJob
from turbo_opt.calibration.sla.run import solve_sla, train_sla
from turbo_opt.calibration.training.logs import CSV
from turbo_opt.calibration.training.world import World
from turbo_opt.capture.folder import find_source

from .architecture import file_mebibytes
from .assemble import MAX_FILE_MEBIBYTES
from .evaluate import load_pipeline
from .samples import draw_samples

CONSISTENCY, RCM = "consistency", "rcm"
SLA, CLOSED_FORM, JOINT = "sla", "sla-closed-form", "rcm-sla"
SOLVED = "closed-form"
"""Folder of the solution that `sla-closed-form` starts from."""
_SHARES = {CONSISTENCY: 0.2, RCM: 0.15, SLA: 0.25, CLOSED_FORM: 0.2, JOINT: 0.2}
"""Of the minutes."""
_WEIGHTS = Path(MODEL, "transformer", "diffusion_pytorch_model.safetensors")
_SHIPPED_NOTES = ("format", "distillation", "sigma_max")


@dataclass(frozen=True)
class StudentTraining:
    """Settings of all trainings.

    Attributes:
        minutes: of all trainings together; making samples and the closed form come on top.
        steps: of each training, instead of minutes: for trials.
        clips: drawn to learn from.
        batch: None takes the jobs' own.
        seed: of the clips.
    """

    minutes: float = 4.5
    steps: int | None = None
    clips: int = 8192
    batch: int | None = None
    seed: int = 0

    def overrides(self, name: str, samples: Path) -> list[str]:
        """What a job's file does not say, as `--set` takes it."""
        said = [f"data.folder={samples}"]
        if self.steps is None:
            said.append(f"training.minutes={self.minutes * _SHARES[name]}")
        else:
            said += [f"training.steps={self.steps}", "training.minutes=null", "data.held_out=2"]
            if name in (SLA, CLOSED_FORM):
                said.append("closed_form.clips=2")
        if self.batch is not None:
            said.append(f"training.batch={self.batch}")
        return said


@tensor_float()
def train_students(
    settings: StudentTraining, work: Path, out: Path, device: torch.device
) -> dict[str, float]:
    """Train all students in `work` and put what is kept of them into `out`; sizes in MiB.

    `out` then has `<student>.safetensors`, and `logs.tar` with each job's log, report and job.

    Raises:
        BadInput: `work` has been used already.
        ValueError: a file is too large to ship.
    """
    work, world = work.absolute(), World(0, 1, device)
    samples = work / "samples"
    with _timed("samples"):
        draw_samples(
            load_pipeline(find_source("tiny-wan"), device), settings.clips, settings.seed, samples
        )

    def sla(name: str, start: str | None = None) -> Report:
        started = [] if start is None else [f"student.start={work / start / MODEL}"]
        job = load_job(_job("sla"), SLAJob, [*settings.overrides(name, samples), *started])
        with _timed(name):
            return train_sla(job, work / name, world, progress=_Progress(name))

    def rcm(name: str, start: str | None = None) -> Report:
        started = [] if start is None else [f"student.start={work / start / MODEL}"]
        job = load_job(_job(name), RCMJob, [*settings.overrides(name, samples), *started])
        with _timed(name):
            return train_rcm(job, work / name, world, progress=_Progress(name))

    out.mkdir(parents=True, exist_ok=True)
    try:
        rcm(CONSISTENCY)
        _ship(work, CONSISTENCY, out)
        rcm(RCM, start=CONSISTENCY)
        _ship(work, RCM, out)
        tuned = {SLA: sla(SLA)}
        job = load_job(_job("sla"), SLAJob, settings.overrides(SLA, samples))
        with _timed(SOLVED):
            solve_sla(job, work / SOLVED, world, progress=_Progress(SOLVED))
        tuned[CLOSED_FORM] = sla(CLOSED_FORM, start=SOLVED)
        best = min(tuned, key=lambda name: float(tuned[name]["after"]["held_out_loss"]))
        print(f"{SLA}.safetensors is {best}", flush=True)
        _ship(work, best, out, SLA)
        rcm(JOINT, start=best)
        _ship(work, JOINT, out)
    finally:  # a job that fails leaves what the others made, and why
        _pack_logs(work, out / "logs.tar")
    return _sizes(out)


def _pack_logs(work: Path, out: Path) -> None:
    with tarfile.open(out, "w") as archive:
        for name in (*_SHARES, SOLVED):
            for file in (CSV, REPORT, JOB):
                if (work / name / file).is_file():
                    archive.add(work / name / file, f"{name}/{file}")


def _sizes(out: Path) -> dict[str, float]:
    """Of all files in MiB."""
    sizes = {path.name: round(file_mebibytes(path), 2) for path in sorted(out.iterdir())}
    too_large = {name: size for name, size in sizes.items() if size > MAX_FILE_MEBIBYTES}
    if too_large:
        raise ValueError(f"files over {MAX_FILE_MEBIBYTES} MiB cannot ship: {too_large}")
    return sizes


def _ship(work: Path, name: str, out: Path, called: str | None = None) -> None:
    """A copy of a job's weights that says what passes ask for, and nothing of the machine it was
    made on."""
    place = out / f"{called or name}.safetensors"
    with safe_open(work / name / _WEIGHTS, framework="pt") as file:
        notes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, place, metadata={k: v for k, v in notes.items() if k in _SHIPPED_NOTES})
    place.chmod(0o644)  # safetensors files are born private


def _job(name: str) -> Path:
    with resources.as_file(resources.files(__package__) / "jobs" / f"{name}.yaml") as path:
        return path


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)


class _Progress:
    """Prints ten lines a job."""

    def __init__(self, name: str) -> None:
        self._name, self._told = name, -1

    def __call__(self, what: str, done: int, total: int, note: str) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth != self._told:
            self._told = tenth
            print(f"{self._name}: {what} {done}/{total} {note}", flush=True)
