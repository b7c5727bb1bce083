"""tiny-wan's students, by the jobs that any model is trained with (`jobs/*.yaml`).

    consistency        four steps, no guidance, by rCM's forward term alone
    rcm                from there, by both terms
    sla                the teacher with sparse-linear attention, from proj_l = 0, and what it
                       learns made to fit `rcm` too
    sla-closed-form    the same, from proj_l solved in closed form
    rcm-sla            consistency with sparse-linear attention, from the better of the last two

`merge-weights` adds what `sla` learned to `rcm` when a recipe is compiled, so the merged student
needs no training and no file of its own; `rcm-sla` is what it is measured against.
"""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from turbo_opt.calibration.export import export_model
from turbo_opt.calibration.flow import tensor_float
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.networks import open_denoiser
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
STUDENTS = (CONSISTENCY, RCM, SLA, JOINT)
"""Those that are kept."""
_SHARES = {CONSISTENCY: 0.08, RCM: 0.06, SLA: 0.36, CLOSED_FORM: 0.36, JOINT: 0.14}
"""Of the minutes."""
_FEW_STEPS_FROM = 0.55
"""Lowest noise level of a clip of four steps is 0.61."""
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
        compile: blocks go through torch.compile.
        seed: of the clips.
    """

    minutes: float = 12.0
    steps: int | None = None
    clips: int = 8192
    batch: int | None = None
    compile: bool = False
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
        if self.compile:
            said.append("training.compile=true")
        return said


@tensor_float()
def train_students(
    settings: StudentTraining,
    work: Path,
    out: Path,
    device: torch.device,
    finished: Path | None = None,
) -> dict[str, float]:
    """Train all students in `work` and put what is kept of them into `out`; sizes in MiB.

    `out` then has `<student>.safetensors`, and `logs.tar` with each job's log, report and job.

    Args:
        finished: folder of files as in `out`; its students are taken over and not trained again.

    Raises:
        BadInput: `work` has been used already.
        ValueError: a file is too large to ship.
    """
    trainings = _Trainings(settings, work.absolute(), out, World(0, 1, device))
    out.mkdir(parents=True, exist_ok=True)
    try:
        trainings.draw_samples()
        if finished is not None:
            trainings.take_over(finished)
        trainings.distil(CONSISTENCY)
        trainings.distil(RCM, start=CONSISTENCY)
        trainings.tune()
        trainings.distil(JOINT, start=SLA)
    finally:  # a job that fails leaves what the others made, and why
        _pack_logs(work, out / "logs.tar")
    return _sizes(out)


def job_file(name: str) -> Path:
    """The file of one of tiny-wan's own jobs."""
    with resources.as_file(resources.files(__package__) / "jobs" / f"{name}.yaml") as path:
        return path


class _Trainings:
    """The jobs of a run, each in `work/<name>`; `models` has the model folders of what is done."""

    def __init__(self, settings: StudentTraining, work: Path, out: Path, world: World) -> None:
        self._settings, self._work, self._out, self._world = settings, work, out, world
        self._samples = work / "samples"
        self.models: dict[str, Path] = {}

    def draw_samples(self) -> None:
        """What is learned from."""
        settings = self._settings
        with _timed("samples"):
            pipeline = load_pipeline(find_source("tiny-wan"), self._world.device)
            draw_samples(pipeline, settings.clips, settings.seed, self._samples)

    def take_over(self, finished: Path) -> None:
        """Students of an earlier run, as the model folders that others start from."""
        for name in STUDENTS:
            file = finished / f"{name}.safetensors"
            if not file.is_file():
                continue
            model = self._work / name / MODEL
            model.parent.mkdir(parents=True)
            teacher = open_denoiser("tiny-wan", "transformer")
            export_model(teacher, load_file(file), model, torch.bfloat16, {}, self._world)
            if file.resolve() != (self._out / file.name).resolve():  # a chain that goes on in place
                shutil.copyfile(file, self._out / file.name)
            self.models[name] = model

    def distil(self, name: str, start: str | None = None) -> None:
        """A job of rCM, unless its student is there."""
        if name in self.models:
            return
        started = [] if start is None else [f"student.start={self.models[start]}"]
        job = load_job(job_file(name), RCMJob, [*self._said(name), *started])
        with _timed(name):
            train_rcm(job, self._work / name, self._world, progress=_Progress(name))
        self._keep(name, name)

    def tune(self) -> None:
        """Both jobs of SLA, unless the student is there; the better is kept."""
        if SLA in self.models:
            return
        tuned = {SLA: self._tune(SLA)}
        job = load_job(job_file("sla"), SLAJob, self._said(SLA))
        with _timed(SOLVED):
            solve_sla(job, self._work / SOLVED, self._world, progress=_Progress(SOLVED))
        tuned[CLOSED_FORM] = self._tune(CLOSED_FORM, self._work / SOLVED / MODEL)
        best = min(tuned, key=lambda name: _held_out_losses(tuned[name]))
        print(f"{SLA}.safetensors is {best}", flush=True)
        self._keep(best, SLA)

    def _tune(self, name: str, start: Path | None = None) -> Report:
        more = [] if start is None else [f"student.start={start}"]
        few_steps = f"{{source: {self.models[RCM]}, noise: {{low: {_FEW_STEPS_FROM}}}}}"
        job = load_job(
            job_file("sla"), SLAJob, [*self._said(name), f"companions=[{few_steps}]", *more]
        )
        with _timed(name):
            return train_sla(job, self._work / name, self._world, progress=_Progress(name))

    def _said(self, name: str) -> list[str]:
        return self._settings.overrides(name, self._samples)

    def _keep(self, trained: str, name: str) -> None:
        self.models[name] = self._work / trained / MODEL
        _ship(self._work, trained, self._out, name)


def _held_out_losses(report: Report) -> float:
    """To the teacher and, merged, to the companion together: both are what it is for."""
    return sum(float(value) for name, value in report["after"].items() if name.endswith("_loss"))


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


def _ship(work: Path, name: str, out: Path, called: str) -> None:
    """A copy of a job's weights that says what passes ask for, and nothing of the machine it was
    made on."""
    place = out / f"{called}.safetensors"
    with safe_open(work / name / _WEIGHTS, framework="pt") as file:
        notes = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, place, metadata={k: v for k, v in notes.items() if k in _SHIPPED_NOTES})
    place.chmod(0o644)  # safetensors files are born private


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
