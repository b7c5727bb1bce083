"""Noise levels: what a job says, and of two experts what the model itself says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_folder import shared_folder
from turbo_opt.calibration.flow import NoiseLevels, settled
from turbo_opt.calibration.jobs.load import load_job
from turbo_opt.calibration.jobs.run import open_parts
from turbo_opt.calibration.jobs.schema import Noise, SLAJob
from turbo_opt.calibration.networks import DenoiserFolder, open_denoiser
from turbo_opt.calibration.sla.run import _objective, _open, train_sla
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput

ALONE = World(0, 1, torch.device("cpu"))
HIGH, LOW = "transformer", "transformer_2"


def quiet(*told: object) -> None:
    """No progress."""


def expert(name: str) -> DenoiserFolder:
    return open_denoiser(str(shared_folder(2)), name)


def job_of(home: Path, source: Path, *settings: str) -> SLAJob:
    return load_job(home / "job.yaml", SLAJob, [f"teacher.source={source}", *settings])


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        (HIGH, {}, (0.7, 1.0)),
        (LOW, {}, (0.0, 0.7)),
        (LOW, {"low": 0.2}, (0.2, 0.7)),
        (LOW, {"high": 0.9}, (0.0, 0.9)),
        (LOW, {"low": 0.0, "high": 1.0}, (0.0, 1.0)),
        (HIGH, {"low": 0.0}, (0.0, 1.0)),
    ],
)
def test_an_expert_is_trained_on_its_side_unless_the_job_says_otherwise(
    name: str, said: dict[str, float], expected: tuple[float, float]
) -> None:
    noise = Noise.model_validate(said)
    assert NoiseLevels.of(noise, expert(name)) == NoiseLevels(3.0, *expected)
    assert NoiseLevels.of(settled(noise, expert(name)), expert(name)).low == expected[0]


def test_ends_in_the_wrong_order_are_refused_also_where_the_model_says_one(home: Path) -> None:
    with pytest.raises(BadInput, match=r"low 0.8 must be below high 0.7; .* from 0 to 0.7"):
        settled(Noise(low=0.8), expert(LOW))
    with pytest.raises(BadInput, match=r"low 0.8 must be below high 0.3"):
        load_job(home / "job.yaml", SLAJob, ["noise={low: 0.8, high: 0.3}"])


def test_a_job_trains_what_was_derived_and_says_it(home: Path) -> None:
    said: list[str] = []
    job = job_of(home, shared_folder(2), "teacher.denoiser=transformer_2")
    parts = open_parts(job, say=said.append)
    assert parts.job.noise == Noise(low=0.0, high=0.7) and parts.job.folder == home
    assert len(said) == 1
    assert said[0].startswith(f"{LOW} is trained at noise levels from 0 to 0.7 (its model has 0.7")
    given = job_of(home, shared_folder(2), "noise={low: 0, high: 1}")
    assert open_parts(given, say=said.append).job.noise == given.noise
    assert len(said) == 1


def test_an_experts_companion_is_trained_on_the_same_side(home: Path) -> None:
    pair = shared_folder(2)
    companions = f"companions=[{{source: {pair}, noise: {{low: 0.8}}}}, {{source: {pair}}}]"
    parts = _open(job_of(home, pair, companions))
    objective = _objective(parts, ALONE)
    assert objective._levels == NoiseLevels(3.0, 0.7, 1.0)
    assert [each.levels.low for each in objective._companions] == [0.8, 0.7]
    assert [each.noise.high for each in parts.job.companions] == [1.0, 1.0]


def test_experts_without_a_boundary_are_trained_on_all_levels_and_one_that_is_none_is_refused(
    home: Path, tmp_path: Path
) -> None:
    pair, said = tmp_path / "pair", []
    shutil.copytree(shared_folder(2), pair)
    index = json.loads((pair / "model_index.json").read_text())

    def with_boundary(value: object) -> SLAJob:
        (pair / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": value}))
        return job_of(home, pair)

    assert open_parts(with_boundary(None), say=said.append).job.noise == Noise(low=0.0, high=1.0)
    assert "from 0 to 1 (its model has no boundary_ratio" in said[0]
    for value in (1.5, "0.7", 0):
        with pytest.raises(BadInput, match=r"boundary_ratio is .*, must be between 0 and 1"):
            open_parts(with_boundary(value))


def test_a_job_of_one_denoiser_says_all_levels_as_its_checkpoints_always_have(
    home: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    job = load_job(home / "job.yaml", SLAJob, ["training.steps=1", "save.every=1"])
    train_sla(job, tmp_path / "out", ALONE, progress=quiet, say=said.append)
    place = tmp_path / "out" / "checkpoints" / "step-000001" / "training.json"
    all_levels = {"shift": None, "low": 0.0, "high": 1.0}
    assert json.loads(place.read_text())["identity"]["noise"] == all_levels
    assert said == []
