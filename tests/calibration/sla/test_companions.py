"""One difference of weights that makes the teacher and another model sparse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_folder import write_tiny_folder
from turbo_opt.calibration.data.batches import Batches
from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.schema import SLAJob
from turbo_opt.calibration.sla.objective import STUDENT, SLAObjective
from turbo_opt.calibration.sla.run import _objective, _open, train_sla
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput

ALONE = World(0, 1, torch.device("cpu"))
FILE = Path("transformer", "diffusion_pytorch_model.safetensors")


def quiet(*told: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def companion(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with every weight a little different."""
    folder = tmp_path_factory.mktemp("companion") / "model"
    shutil.copytree(home / "teacher", folder)
    torch.manual_seed(1)
    weights = load_file(folder / FILE)
    changed = {n: w + 0.1 * w.std() * torch.randn_like(w) for n, w in weights.items()}
    save_file(changed, folder / FILE, metadata={"format": "pt"})
    return folder


def job_of(home: Path, companion: Path, *settings: str) -> SLAJob:
    named = f"companions=[{{source: {companion}, noise: {{low: 0.5}}}}]"
    return load_job(home / "job.yaml", SLAJob, [named, *settings])


def objective_of(job: SLAJob) -> SLAObjective:
    return _objective(_open(job), ALONE)


def batch_of(job: SLAJob):
    samples = SampleSet.open(job.path(job.data.folder))
    return Batches(samples, list(range(4)), 0, ALONE.device, unconditional=True).at(range(2))


def test_in_its_turn_a_companion_gets_the_students_difference_and_gives_its_gradient(
    home, companion
) -> None:
    objective = objective_of(job_of(home, companion))
    student, other = objective.trained[STUDENT], objective._companions[0]
    name = "blocks.0.ffn.net.2.weight"
    with torch.no_grad():
        student.get_parameter(name).add_(0.25)
    objective.turn(1)
    own = load_file(companion / FILE)[name]
    torch.testing.assert_close(other.sparse.network.get_parameter(name), own.float() + 0.25)

    batch = batch_of(job_of(home, companion))
    objective.loss(batch, STUDENT).value.backward()
    expected = {
        n: p.grad
        for n, p in student.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    assert len(expected) > 40
    assert all(p.grad is None for p in other.sparse.network.parameters())

    alone = objective_of(load_job(home / "job.yaml", SLAJob, []))
    network = alone.trained[STUDENT]
    with torch.no_grad():
        for n, parameter in network.named_parameters():
            parameter.copy_(other.sparse.network.get_parameter(n))
    alone.teacher, alone._levels = other.dense, other.levels
    alone._share = objective._share
    alone.loss(batch, STUDENT).value.backward()
    for n, gradient in expected.items():
        torch.testing.assert_close(network.get_parameter(n).grad, gradient)


def test_both_are_nearer_to_their_dense_models_after_the_tuning(home, companion, tmp_path) -> None:
    settings = ("training.steps=40", "training.batch=4", "log.evaluate_every=40")
    job = job_of(home, companion, *settings)
    report = train_sla(job, tmp_path / "out", ALONE, progress=quiet)
    for of in ("", "companion_1_"):
        name = f"held_out_{of}relative_error"
        assert report["after"][name] < 0.95 * report["before"][name]


def test_a_companion_that_was_trained_anew_in_its_place_stops_a_resume(
    home, companion, tmp_path
) -> None:
    own, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(companion, own)
    job = job_of(home, own, "training.steps=1", "save.every=1")
    train_sla(job, out, ALONE, progress=quiet)
    (own / FILE).touch()
    assert train_sla(job, out, ALONE, resume=True, progress=quiet)["first_step"] == 1
    weights = {name: value + 0.001 for name, value in load_file(own / FILE).items()}
    save_file(weights, own / FILE, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"other weights than are there now of companions\[0\]"):
        train_sla(job, out, ALONE, resume=True, progress=quiet)


def test_a_companion_of_another_architecture_is_refused(home, tmp_path) -> None:
    other = write_tiny_folder(tmp_path / "other", transformer={"num_layers": 3})
    with pytest.raises(BadInput, match="different architectures: num_layers is 2 and 3"):
        train_sla(job_of(home, other), tmp_path / "out", ALONE, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_companion_that_is_tuned_itself_is_refused(home, companion, tmp_path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(companion, tuned)
    weights = load_file(tuned / FILE)
    weights["blocks.0.attn1.proj_l.weight"] = torch.zeros(1)
    save_file(weights, tuned / FILE, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"has blocks\.0\.attn1\.proj_l\.weight: it is tuned"):
        train_sla(job_of(home, tuned), tmp_path / "out", ALONE, progress=quiet)
    assert not (tmp_path / "out").exists()
